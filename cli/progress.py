"""What is shown while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cotune.cli.remote_lines import remote_line
from cotune.client.observe import observing
from cotune.privacy.rounding import round_up
from cotune.server.events import Listener, listening
from cotune.server.figures import duration, size

_FEATURE_SECONDS = 5.0  # between two plain lines about encoding


@contextmanager
def showing_progress(console: Console) -> Iterator[None]:
    """Shows the events and steps of this process during the block."""
    display = _Live(console) if console.is_terminal else _Lines(console)
    with display, listening(display.event), observing(display.step):
        yield


@contextmanager
def showing_remote_progress(console: Console) -> Iterator[Listener]:
    """Gives what shows the events of a run that another process plays."""
    with _Live(console, timing=()) if console.is_terminal else _Lines(console) as display:

        def tell(event: str, fields: dict[str, Any]) -> None:
            if line := remote_line(event, fields):
                display.print(line)
            display.event(event, fields)

        yield tell


class _Lines:
    """One line per thing worth knowing; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console, self.told, self.rounds = console, 0.0, 0
        self.seconds: list[float] = []  # of each round so far; clocks tell nothing of a run that was played before it is shown

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)

    def event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "run_started":
            self.rounds, self.seconds = fields["rounds"], []
            after = f", going on after round {fields['resumed_after']}" if fields["resumed_after"] else ""
            self.print(f"run {fields['folder']}")
            self.print(f"plan {fields['plan']} ({fields['plan_id'][:12]}…): {fields['rounds']} rounds{after}")
        elif event == "round_finished":
            self.seconds.append(fields["seconds"])
            self.print(_round_line(fields, self.rounds, self._remaining(fields["round"])))
        elif event == "update_dropped":
            self.print(f"round {fields['round']}: {fields['organisation']} left out: {fields['reason']}")
        elif event == "run_stopped":
            self.print(f"the run was stopped: {fields['reason']}")
        elif event == "baseline_failed":
            self.print(f"baseline {fields['baseline']} could not be trained: {fields['reason']}")
        elif event == "baseline_finished":
            self.print(f"baseline {fields['baseline']}: accuracy {fields['metrics']['accuracy']:.3f}")

    def _remaining(self, round: int) -> float | None:
        """By the rounds so far, but for the first, which encodes the records; None while that is the only one."""
        return mean(self.seconds[1:]) * (self.rounds - round) if self.seconds[1:] else None

    def step(self, what: str, details: dict[str, Any]) -> None:
        if what == "features" and (time.monotonic() - self.told > _FEATURE_SECONDS or details["done"] == details["total"]):
            self.told = time.monotonic()
            records = f"the {details['total']:,} distinct records of {_file_of(details)}"
            self.print(f"encoding {records} once, for all who read that file: {details['done']:,} done")


class _Live(_Lines):
    """The same lines above a bar that shows who is doing what right now."""

    def __init__(
        self, console: Console, timing: tuple[ProgressColumn, ...] = (TimeElapsedColumn(), TimeRemainingColumn())
    ) -> None:
        super().__init__(console)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *timing)
        self.progress = Progress(*columns, console=console, transient=True)
        self.bars: dict[str, TaskID] = {}
        self.baseline = ""

    def __enter__(self) -> _Live:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def event(self, event: str, fields: dict[str, Any]) -> None:
        super().event(event, fields)
        if event == "run_started":
            self._bar("rounds", "rounds", fields["resumed_after"], fields["rounds"])
        elif event == "round_finished":
            self._bar("rounds", "rounds", fields["round"], self.rounds)
        elif event == "baseline_started":
            self.baseline = fields["baseline"]
        elif event == "run_finished":
            self._drop("steps")

    def step(self, what: str, details: dict[str, Any]) -> None:
        if what == "features":
            self._bar("features", escape(f"encoding {_file_of(details)} once"), details["done"], details["total"])
            if details["done"] == details["total"]:
                self._drop("features")
            return
        spent = f", ε {round_up(details['epsilon'])}" if details["epsilon"] is not None else ""
        loss = f", loss {details['loss']:.3f}" if details["loss"] is not None else ""
        where = f"baseline {self.baseline}" if self.baseline else details["organisation"]
        self._bar("steps", f"round {details['round']}, {where}{loss}{spent}", details["step"], details["steps"])

    def _bar(self, key: str, description: str, done: int, total: int) -> None:
        if key not in self.bars:
            self.bars[key] = self.progress.add_task(description, total=total)
        self.progress.update(self.bars[key], description=description, completed=done, total=total)

    def _drop(self, key: str) -> None:
        if key in self.bars:
            self.progress.remove_task(self.bars.pop(key))


def _file_of(details: dict[str, Any]) -> str:
    """The file, or the package, whose records are encoded; without its folder."""
    return Path(details["source"]).name


def _round_line(fields: dict[str, Any], rounds: int, remaining: float | None) -> str:
    parts = [f"round {fields['round']}/{rounds} ({fields['stage']})", f"{len(fields['participants'])} organisations"]
    if fields["metrics"]:
        parts.append(f"test accuracy {fields['metrics']['accuracy']:.3f}")
    if fields["epsilon"]:
        parts.append(f"ε {round_up(max(fields['epsilon'].values()))}")
    parts.append(f"{size(fields['bytes_up'])} up, {size(fields['bytes_down'])} down")
    if remaining is not None and fields["round"] < rounds:
        parts.append(f"{duration(remaining)} left")
    return ", ".join(parts)
