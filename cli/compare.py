"""`cotune compare`: strategies side by side on the same data and seeds, with error bars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.compare_progress import showing_cells
from cotune.cli.plan_options import (
    AsJson,
    By,
    Clients,
    Data,
    Label,
    Model,
    Partition,
    PlanArgument,
    PlanOptions,
    Set,
    Task,
    Text,
)
from cotune.cli.screen import beginning, screen
from cotune.cli.selection_lines import show_selected, showing_selection
from cotune.privacy.rounding import round_up
from cotune.server.figures import duration, size

if TYPE_CHECKING:
    from cotune.simulations.comparison import Combination, Comparison, Settings, Variation


_WIDE = 100  # characters; a narrower terminal leaves bytes and time to the page


def compare(
    plan: PlanArgument = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2", help="A key of the plan and its values; repeatable. The first key is the one compared."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many: the plan's own and those after it; default: 5.", show_default=False)
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The value that others are compared with; default: the first.")] = None,
    data: Data = None,
    task: Task = None,
    text: Text = None,
    label: Label = None,
    model: Model = None,
    clients: Clients = None,
    partition: Partition = None,
    by: By = None,
    override: Set = None,
    gain: Annotated[
        bool,
        typer.Option("--gain", help="Train each organization alone, too, and show what joining brings it on its own records."),
    ] = False,
    private_selection: Annotated[
        float | None,
        typer.Option(
            metavar="RUNS",
            help="Release the best of a secret number of runs (RUNS on average) and nothing of the others; ε covers the choice.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; default: compare/<plan>; of a selection: selected/<plan>.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs beside each other; default: as cores and memory allow, 1 on a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Play every combination under every seed and show what differs; finished runs are kept, the same command goes on."""
    options = PlanOptions(plan, data, task, text, label, model, clients, partition, by, override)
    options.check_files(vary or ())
    beginning(f"plan {options.source}: loading PyTorch; every combination is checked, then played", quiet=as_json)
    from cotune.simulations.cells import parse_variation

    told = screen(stderr=as_json)
    variations = [parse_variation(each) for each in vary or []]
    given = [*options.overrides, *(['simulation.baselines=["alone"]'] if gain else [])]
    common: dict[str, Any] = {"overrides": given, "out": out, "jobs": jobs, "device": device}
    if private_selection is not None:
        if seeds not in (None, 1) or baseline is not None:
            raise typer.BadParameter(
                "a private selection takes no --seeds and no --baseline: another seed would test on records that train"
            )
        _select(told, as_json, options.source, variations, private_selection, common)
        return
    grid = {"seeds": 5 if seeds is None else seeds, "baseline": baseline, **common}
    _compare(told, as_json, options.source, variations, grid)


def _compare(console: Console, as_json: bool, source: str, variations: list[Variation], options: dict[str, Any]) -> None:
    from cotune.simulations.compare import compare as play

    with showing_cells(console) as listener:
        found = play(source, variations, listener=listener, **options)
    if as_json:
        typer.echo((found.folder / "results.json").read_text(encoding="utf-8"))
    else:
        show(console, found)
    if found.failed:
        raise typer.Exit(1)


def _select(
    console: Console,
    as_json: bool,
    source: str,
    variations: list[Variation],
    expected_runs: float,
    options: dict[str, Any],
) -> None:
    from cotune.simulations.selection import select

    with showing_selection(console) as listener:
        found, folder = select(source, variations, expected_runs=expected_runs, listener=listener, **options)
    if as_json:
        typer.echo((folder / "results.json").read_text(encoding="utf-8"))
    else:
        show_selected(console, found, folder)


def show(console: Console, found: Comparison) -> None:
    """The tables at the end, one for each facet."""
    from cotune.simulations.comparison_report import GAIN, TIME, answer, facets_of, few_seeds, has_gain, together, words

    costs = console.width >= _WIDE
    for facet, rows in facets_of(found):
        console.print(_table(found, facet, rows, costs=costs))
        if said := answer(rows, found.baseline):
            console.print(f"[bold]{escape(said)}[/bold]")
    for cell in found.failed:
        console.print(f"[bold red]failed[/bold red]: {escape(words(cell.settings))}, seed {cell.seed}: {escape(cell.reason)}")
    if few := few_seeds(found):
        console.print(few)
    console.print(
        "accuracy: of the last model, on everybody's test records; worst and spread: over the organizations' own accuracies"
    )
    console.print("± and p: 95 % interval and paired t-test over the seeds, p corrected by Holm's method for each table")
    if costs:
        console.print(TIME)
    if has_gain(found):
        console.print(GAIN)
    if found.private:
        console.print(together(found))
    for file in ("compare.html", "results.csv", "results.json"):
        console.print(f"{file:<13} {found.folder / file}", soft_wrap=True)
    console.print("next: the same command with further values or seeds plays only those; it also goes on where it was stopped")


def _table(found: Comparison, facet: Settings, rows: list[Combination], *, costs: bool) -> Table:
    from cotune.simulations.comparison_report import answers_of, has_gain, points, words

    title = escape(words(facet)) or None
    gain = has_gain(found)
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None)
    table.add_column(escape(found.variations[0].key), overflow="fold")
    headings = (
        "accuracy %",
        "difference",
        "p",
        "worst %",
        "spread",
        *(("gain", "worth it") if gain else ()),
        *(("up", "down", "time") if costs else ()),
    )
    for heading in (*headings, *(("ε",) if found.private else ()), "runs"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        gained = (points(row.gain, apart=True), answers_of(row)) if gain else ()
        figures = (
            *_quality(row, found.baseline),
            *gained,
            *(_costs(row) if costs else ()),
            *((_spent(row),) if found.private else ()),
        )
        finished = f"{len(row.cells) - len(row.failed)} of {len(row.cells)}"
        style = "bold" if row.difference and row.difference.significant else None
        table.add_row(escape(row.value), *figures, finished, style=style)
    return table


def _quality(row: Combination, baseline: str) -> tuple[str, ...]:
    from cotune.simulations.comparison_report import points, verdict

    apart = points(row.difference.estimate if row.difference else None, apart=True)
    p = verdict(row).removeprefix("p ").removeprefix("= ")
    return points(row.accuracy), "baseline" if row.value == baseline else apart, p, points(row.worst), points(row.spread)


def _costs(row: Combination) -> tuple[str, ...]:
    sent = ("–" if count is None else size(count) for count in (row.bytes_up, row.bytes_down))
    return *sent, "–" if row.seconds is None else duration(row.seconds)


def _spent(row: Combination) -> str:
    return "–" if row.epsilon is None else round_up(row.epsilon)
