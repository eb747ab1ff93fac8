"""Implement `cotune compare`: show the progress of the runs, and the tables at the end.

With --private-selection, show the start and what is released, but nothing about single runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.comparison_progress import showing_cells, showing_selection
from cotune.cli.console import open_console
from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.comparison_report import (
    GAIN,
    TIME,
    answer,
    answers_of,
    facets_of,
    few_seeds,
    has_gain,
    points,
    together,
    verdict,
    words,
)
from cotune.reporting.comparison_statistics import Combination, Comparison, Settings, Variation
from cotune.reporting.formatting import duration, size
from cotune.reporting.measures import Measure, get_measures
from cotune.simulations.comparison.compare import compare
from cotune.simulations.comparison.grid import parse_variation
from cotune.simulations.comparison.private_selection import select
from cotune.simulations.comparison.private_selection_release import Selected, build_statement

_WIDE = 100  # characters; a narrower terminal leaves bytes and time to the page


@dataclass(frozen=True)
class Grid:
    """What a command line says of a comparison. vary: as `KEY=V1,V2`; out, jobs: None for the default."""

    source: str
    vary: tuple[str, ...]
    overrides: list[str]
    out: Path | None
    jobs: int | None
    device: str

    @property
    def variations(self) -> list[Variation]:
        """The parsed values of --vary."""
        return [parse_variation(each) for each in self.vary]

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that `compare` and `select` share."""
        return {"overrides": self.overrides, "out": self.out, "jobs": self.jobs, "device": self.device}


def compare_grid(grid: Grid, seeds: int, baseline: str | None, *, as_json: bool) -> None:
    """Run a comparison and print its tables.

    Args:
        grid: Which plans.
        seeds: How many of them.
        baseline: The value that others are compared with; None: the first.
        as_json: Whether a program reads the output.

    Raises:
        typer.Exit: With 1, where a run failed.
    """
    console = open_console(stderr=as_json)
    with showing_cells(console) as listener:
        found = compare(grid.source, grid.variations, seeds=seeds, baseline=baseline, listener=listener, **grid.options)
    if as_json:
        typer.echo((found.folder / "results.json").read_text(encoding="utf-8"))
    else:
        show(console, found)
    if found.failed:
        raise typer.Exit(1)


def select_privately(grid: Grid, expected_runs: float, *, as_json: bool) -> None:
    """Run a private selection and print what it releases.

    Args:
        grid: Which plans.
        expected_runs: The mean of the secret number of runs.
        as_json: Whether a program reads the output.
    """
    console = open_console(stderr=as_json)
    with showing_selection(console) as listener:
        found, folder = select(grid.source, grid.variations, expected_runs=expected_runs, listener=listener, **grid.options)
    if as_json:
        typer.echo((folder / "results.json").read_text(encoding="utf-8"))
    else:
        show_selected(console, found, folder)


def show(console: Console, found: Comparison) -> None:
    """The tables at the end, one for each facet."""

    costs = console.width >= _WIDE
    for facet, rows in facets_of(found):
        console.print(_table(found, facet, rows, costs=costs))
        if said := answer(rows, found.baseline, found.measure):
            console.print(f"[bold]{escape(said)}[/bold]")
    for cell in found.failed:
        console.print(f"[bold red]failed[/bold red]: {escape(words(cell.settings))}, seed {cell.seed}: {escape(cell.reason)}")
    for note in found.notes:
        console.print(escape(note))
    if few := few_seeds(found):
        console.print(few)
    console.print(
        f"{found.measure.key}: of the last model, on everybody's test records; worst and spread: over the organizations, on"
        " records like theirs"
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

    title = escape(words(facet)) or None
    gain = has_gain(found)
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None)
    table.add_column(escape(found.variations[0].key), overflow="fold")
    headings = (
        f"{found.measure.key} ({found.measure.number})",
        "difference",
        "p",
        "worst",
        "spread",
        *(("gain", "worth it") if gain else ()),
        *(("up", "down", "time") if costs else ()),
    )
    for heading in (*headings, *(("ε",) if found.private else ()), "runs"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        gained = (points(row.gain, found.measure, apart=True), answers_of(row)) if gain else ()
        figures = (
            *_quality(row, found.baseline, found.measure),
            *gained,
            *(_costs(row) if costs else ()),
            *((_spent(row),) if found.private else ()),
        )
        finished = f"{len(row.cells) - len(row.failed)} of {len(row.cells)}"
        style = "bold" if row.difference and row.difference.significant else None
        table.add_row(escape(row.value), *figures, finished, style=style)
    return table


def _quality(row: Combination, baseline: str, measure: Measure) -> tuple[str, ...]:
    apart = points(row.difference.estimate if row.difference else None, measure, apart=True)
    p = verdict(row).removeprefix("p ").removeprefix("= ")
    shown = "baseline" if row.value == baseline else apart
    return points(row.score, measure), shown, p, points(row.worst, measure), points(row.spread, measure)


def _costs(row: Combination) -> tuple[str, ...]:
    sent = ("–" if count is None else size(count) for count in (row.bytes_up, row.bytes_down))
    return *sent, "–" if row.seconds is None else duration(row.seconds)


def _spent(row: Combination) -> str:
    return "–" if row.epsilon is None else round_up(row.epsilon)


def show_selected(console: Console, found: Selected, folder: Path) -> None:
    """Print the selected plan with its test metrics and ε, and what that promises.

    Args:
        console: To print to.
        found: The result of the selection.
        folder: Of the selection.
    """

    table = Table(header_style="bold", pad_edge=False, box=None)
    for key in found.settings:
        table.add_column(escape(key), overflow="fold")
    measures = get_measures(found.test)
    for heading in (*(each.name for each in measures), "ε", "δ"):
        table.add_column(heading, justify="right")
    shown = (each.show(found.test[each.key]) for each in measures)
    figures = (*shown, round_up(found.epsilon), f"{found.delta:.1e}")
    table.add_row(*(escape(value) for value in found.settings.values()), *figures)
    console.print(table)
    for paragraph in build_statement(found):
        console.print(paragraph, markup=False)
    console.print(f"released      {folder}", soft_wrap=True, markup=False)
