"""Show the progress of a run: a live line on a terminal, plain lines elsewhere.

This includes events that occur only in a real federation: who is awaited, refused, lost and connected again.
"""

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

from cotune.client.local_events import observe_client
from cotune.observers import Observer
from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.formatting import duration, size
from cotune.reporting.measures import headline
from cotune.server.runs.events import observe_run


def remote_line(event: str, fields: dict[str, Any]) -> str | None:
    """None for any other event."""
    who = fields.get("organization")
    round = fields.get("round")
    match event:
        case "waiting":
            return _waiting(fields)
        case "awaiting_approval":
            return _awaiting_approval(fields)
        case "round_started" if round == 1:
            return f"round 1: asking {', '.join(fields['organizations'])}; each encodes its records first, for minutes"
        case "update_received":
            return _received(fields)
        case "update_quarantined":
            return f"round {round}: the update of {who} was rejected and quarantined: {fields['reason']}"
        case "messages_refused":
            return f"{who} has had {fields['count']} messages refused at the public port: {fields['reason']}"
        case "round_not_applied":
            return _not_applied(fields)
        case "weight_is_small":
            return f"{who} counts {100 * fields['weight']:.2g} % only: agree on its number of records (`invite --examples`)"
        case "note":
            return f"note: {fields['text']}"
        case "client_excluded":
            return f"{who} is left out of the run from now on: {fields['reason']}"
        case "connection_lost":
            return f"the connection to the SuperLink is lost: {fields.get('reason', 'it does not answer')}"
        case "connection_restored":
            return "the connection to the SuperLink is back"
        case "whole_state_sent":
            return f"round {round}: {who} does not hold the version of the model that it should: it is sent the whole"
        case "organization_left":
            return f"{who} has left the federation: it is asked again once it rejoins"
        case "delivered":
            return f"{who} has the finished model"
        case "delivery_failed":
            return f"{who} lacks the finished model: {fields['reason']}; --resume hands it out again"
        case "late_update_received":
            return f"round {round}: {who} answered late, to round {fields['of_round']}: its update counts less"
        case "late_update_ignored":
            return f"round {round}: {who} answered too late, to round {fields['of_round']}: not used"
        case "superlink_lost":
            return "the SuperLink does not answer; the run waits for it: see whether `cotune server start` still runs"
        case "superlink_back":
            return "the SuperLink answers again"
        case "run_lost":
            return f"the run ended unexpectedly ({fields['reason']}); it is submitted again in {fields['seconds']:g} seconds"
        case "run_stopping":
            return "stopping the run, which may take a quarter of a minute"
        case _:
            return None


def _waiting(fields: dict[str, Any]) -> str:
    connected = fields["connected"]
    there = connected if isinstance(connected, int) else len(connected)
    absent = f"; not connected: {', '.join(fields['absent'])}" if fields["absent"] else ""
    return f"waiting for organizations: {there} connected, {fields['needed']} needed{absent}"


def _awaiting_approval(fields: dict[str, Any]) -> str:
    round = fields["round"]
    names = ", ".join(fields["organizations"])
    if not names:
        return f"round {round}: nobody has to approve the plan any more"
    return (
        f"round {round}: nobody has approved the plan yet at {names} (there: `cotune client approve SITE`); they are asked again"
        " until somebody has, and the round goes on without them where the others are enough"
    )


def _not_applied(fields: dict[str, Any]) -> str:
    names = ", ".join(each["organization"] for each in fields["suspects"])
    whom = f"; what stood out most: the update of {names}" if names else ""
    fell = "" if fields["accuracy"] is None else f" on the test set fell to {fields['accuracy']:.3f}"
    why = fields.get("reason") or f"the accuracy{fell or ' fell'} (server.max_accuracy_drop)"
    return f"round {fields['round']} is not applied, as {why}: the model before it stays{whom}"


def _received(fields: dict[str, Any]) -> str:
    spent = "" if fields["epsilon"] is None else f", ε {round_up(fields['epsilon'])} stated"
    return f"round {fields['round']}: {fields['organization']} answered, {size(fields['bytes'])}{spent}"


_FEATURE_SECONDS = 5.0  # between two plain lines about encoding


@contextmanager
def showing_progress(console: Console) -> Iterator[None]:
    """Shows the events and steps of this process during the block."""
    display = _Live(console) if console.is_terminal else _Lines(console)
    with display, observe_run(display.event), observe_client(display.step):
        yield


@contextmanager
def showing_remote_progress(console: Console) -> Iterator[Observer]:
    """Gives what shows the events of a run that another process plays."""
    with _Live(console, timing=()) if console.is_terminal else _Lines(console) as display:

        def notify(event: str, fields: dict[str, Any]) -> None:
            if line := remote_line(event, fields):
                display.print(line)
            display.event(event, fields)

        yield notify


class _Lines:
    """One line per thing worth knowing; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.shown_at = 0.0
        self.rounds = 0
        self.seconds: list[float] = []  # of each round so far; they say nothing of rounds that ran before the display started

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)

    def event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "run_started":
            self.rounds = fields["rounds"]
            self.seconds = []
            after = f", going on after round {fields['resumed_after']}" if fields["resumed_after"] else ""
            self.print(f"run {fields['folder']}")
            self.print(f"plan {fields['plan']} ({fields['plan_id'][:12]}…): {fields['rounds']} rounds{after}")
        elif event == "round_finished":
            self.seconds.append(fields["seconds"])
            self.print(_round_line(fields, self.rounds, self._remaining(fields["round"])))
        elif event == "update_dropped":
            self.print(f"round {fields['round']}: {fields['organization']} left out: {fields['reason']}")
        elif event == "run_stopped":
            self.print(f"the run was stopped: {fields['reason']}")
        elif event == "baseline_failed":
            self.print(f"baseline {fields['baseline']} could not be trained: {fields['reason']}")
        elif event == "baseline_finished":
            self.print(f"baseline {fields['baseline']}: {headline(fields['metrics'])}")
        elif event == "adapted":
            self.print(f"{fields['organization']} has adapted the model to its own records: {fields['method']}")
        elif event == "adaptation_failed":
            self.print(f"{fields['organization']} could not adapt the model to its own records: {fields['reason']}")

    def _remaining(self, round: int) -> float | None:
        """By the rounds so far, but for the first, which encodes the records; None while that is the only one."""
        return mean(self.seconds[1:]) * (self.rounds - round) if self.seconds[1:] else None

    def step(self, what: str, details: dict[str, Any]) -> None:
        if what == "features" and (time.monotonic() - self.shown_at > _FEATURE_SECONDS or details["done"] == details["total"]):
            self.shown_at = time.monotonic()
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
        baseline = details.get("baseline", self.baseline)  # of the worker that trains it, or the one that has begun
        where = f"baseline {baseline}" if baseline else details["organization"]
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
    parts = [f"round {fields['round']}/{rounds} ({fields['stage']})", f"{len(fields['participants'])} organizations"]
    if fields["metrics"]:
        parts.append(f"test {headline(fields['metrics'])}")
    if fields["epsilon"]:
        parts.append(f"ε {round_up(max(fields['epsilon'].values()))}")
    parts.append(f"{size(fields['bytes_up'])} up, {size(fields['bytes_down'])} down")
    if remaining is not None and fields["round"] < rounds:
        parts.append(f"{duration(remaining)} left")
    return ", ".join(parts)
