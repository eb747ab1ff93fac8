"""What `cotune compare` does and shows: the runs while they go on, and the tables at the end.

With --private-selection: how it begins and what is released, and nothing of single runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cotune.cli.screen import screen
from cotune.privacy.accounting.rounding import round_up
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
from cotune.simulations.comparison.selected import Selected, build_statement
from cotune.simulations.comparison.selection import select

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
    console = screen(stderr=as_json)
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
    console = screen(stderr=as_json)
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


_CHECK_SECONDS = 10.0  # between two plain lines about checking


@contextmanager
def showing_cells(console: Console) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A listener for `compare`, which shows what it hears during the block."""
    if not console.is_terminal:
        yield _Lines(console).event
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Live(console, progress).event


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.done = 0
        self.cells = 0
        self.shown_at = time.monotonic()

    def print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)

    def event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "cell_checked":
            self._checking(fields)
        elif event == "comparison_started":
            self.cells = fields["cells"]
            self.done = fields["finished"]
            for note in fields["notes"]:
                self.print(note)
            self.print(f"{self.cells} runs, {self.done} of them finished before, in {fields['folder']}")
        elif event == "cell_finished":
            self.done += 1
            spent = duration(fields["seconds"])
            self.print(f"{self.done}/{self.cells} {fields['cell']}: test {fields['score']}, {spent}")
        elif event == "cell_failed":
            self.done += 1
            self.print(f"{self.done}/{self.cells} {fields['cell']} failed: {fields['reason']}")

    def _checking(self, fields: dict[str, Any]) -> None:
        """At the first combination how many there are, and from time to time how far it is."""
        if not fields["checked"]:
            self.print(f"checking {_counted(fields)} against data and model")
        elif time.monotonic() - self.shown_at <= _CHECK_SECONDS:
            return
        else:
            self.print(f"checked {fields['checked']} of {fields['cells']}")
        self.shown_at = time.monotonic()


def _counted(fields: dict[str, Any]) -> str:
    """Such as "16 combinations, each under 5 seeds"."""
    combinations = f"{fields['combinations']} combination{'s' if fields['combinations'] > 1 else ''}"
    return combinations if fields["seeds"] == 1 else f"{combinations}, each under {fields['seeds']} seeds,"


class _Live(_Lines):
    """The same lines above a bar for all cells and one for each that is running."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self.progress = progress
        self.bars: dict[str, TaskID] = {}

    def event(self, event: str, fields: dict[str, Any]) -> None:
        super().event(event, fields)
        if event == "cell_checked":
            return
        if event == "comparison_started":
            self.progress.remove_task(self.bars.pop("checking plans"))
            self.bars[""] = self.progress.add_task("runs", total=self.cells, completed=self.done)
        elif event == "cell_started":
            self.bars[fields["cell"]] = self.progress.add_task(escape(fields["cell"]), total=fields["rounds"])
        elif event == "cell_round":
            self.progress.update(self.bars[fields["cell"]], completed=fields["round"])
        else:
            self.progress.remove_task(self.bars.pop(fields["cell"]))
            self.progress.update(self.bars[""], completed=self.done)

    def _checking(self, fields: dict[str, Any]) -> None:
        if "checking plans" not in self.bars:
            super()._checking(fields)
            self.bars["checking plans"] = self.progress.add_task("checking plans", total=fields["cells"])
        self.progress.update(self.bars["checking plans"], completed=fields["checked"])


@contextmanager
def showing_selection(console: Console) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A listener for `select`, with a sign of life on a terminal. How many runs there are is a secret, so that nothing counts."""
    with console.status("checking plans") as status:

        def listen(event: str, fields: dict[str, Any]) -> None:
            if event == "selection_started":
                cost = f"ε = {round_up(fields['epsilon'])} at δ = {fields['delta']:.1e}"
                line = f"choosing among {fields['plans']} plans in {fields['folder']}: {cost} for what is released"
                console.print(line, soft_wrap=True, markup=False)
                status.update("playing a secret number of runs")

        yield listen


def show_selected(console: Console, found: Selected, folder: Path) -> None:
    """The table at the end, and what it promises."""

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
