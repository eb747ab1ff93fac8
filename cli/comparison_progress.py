"""Show the progress of `cotune compare`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.formatting import duration

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
