"""A run on the SuperLink, from the coordinator's side: submitted, followed, submitted again where it was lost, stopped.

The SuperLink's executor executes a run in a process of its own, which holds the lock of the run's folder meanwhile: whether the
lock is held decides whether the run is running. A process that follows a run may be killed and started again: the run goes on.
The last submission is in superlink.json in the run's folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

from cotune.errors import RunError
from cotune.flower.control_client import RunState, SuperLinkUnreachable
from cotune.observers import Observer
from cotune.reporting.documents.events import Event
from cotune.server.deployment.execution.run_process import is_running, wait_until_stopped
from cotune.server.deployment.execution.submission import Submission, read_submission, write_submission
from cotune.server.deployment.federation import FederationFolder
from cotune.server.runs.events import follow
from cotune.server.runs.run_folder import RunFolder, lock_folder

_Answer = TypeVar("_Answer")
_MAX_TRIES = 5  # without a finished round between them
_STARTING_EVENTS = ("run_started", "delivery_started")  # of a process that holds the lock
_FINAL_EVENTS = ("run_finalized", "run_failed")


class Executor(Protocol):
    """Calls to the SuperLink; each raises SuperLinkUnreachable where nobody answers."""

    def start(self, run: Path) -> int: ...
    def stop(self, run_id: int) -> None: ...
    def state(self, run_id: int) -> RunState | None: ...
    def running(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class PollInterval:
    """Times, in seconds.

    Attributes:
        poll: Between two looks at a run.
        again: Before a lost run is submitted again; doubled with every try.
        grace: For the process of a run to end by itself, once the SuperLink has given it up.
    """

    poll: float = 0.5
    again: float = 2.0  # doubled with every try
    grace: float = 10.0


def newest(federation: FederationFolder, name: str | None = None) -> RunFolder:
    """Return the run with this name, or else the last that was begun. Raises RunError where there is none."""
    runs = [path for path in federation.runs() if name in (None, path.name)]
    if not runs:
        known = f"called {name[:100]!r} " if name else ""
        raise RunError(f"{federation.path} has no run {known}to go on with: begin one without --resume", code="run.unknown_run")
    return RunFolder(runs[-1])


def check_none_unfinished(federation: FederationFolder, executor: Executor, *, leave: bool) -> None:
    """Check that a new run may begin.

    Args:
        federation: The federation.
        executor: The SuperLink.
        leave: Whether an unfinished run that nobody executes may be left behind.

    Raises:
        RunError: If a run is running, or is unfinished and may not be left.
    """
    runs = list(federation.runs())
    for path in runs:
        if is_running(path) or (path == runs[-1] and _is_submitted(RunFolder(path), executor)):
            raise RunError(
                f"the run {path.name} is going on: follow it with --resume, and stop it there before you begin another",
                code="run.already_running",
            )
    if runs and not leave and not RunFolder(runs[-1]).finished:
        raise RunError(
            f"the run {runs[-1].name} is not finished: go on with it (--resume), or leave it and begin another (--new)",
            code="run.unfinished_run",
        )


def _is_submitted(folder: RunFolder, executor: Executor) -> bool:
    ticket = read_submission(folder)
    return ticket is not None and _get_running_id(folder, ticket, executor) is not None


@contextmanager
def lock_runs(federation: FederationFolder) -> Iterator[None]:
    """Let no other process submit or follow runs of the federation during the block. Raises RunError where one does."""
    try:
        federation.files.runs.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{federation.path} cannot be written ({error.strerror}): correct its permissions", code="run.not_writable"
        ) from None
    with lock_folder(federation.files.runs):
        yield


def submit(folder: RunFolder, executor: Executor, pace: PollInterval | None = None) -> Submission:
    """Return the attempt that is running; otherwise make a new one, once no process executes the run. Raises RunError."""
    ticket = read_submission(folder)
    if ticket is not None:
        run_id = _get_running_id(folder, ticket, executor)
        if run_id is not None:
            return write_submission(folder, ticket.model_copy(update={"run_id": run_id}))
    wait_until_stopped(folder.path, (pace or PollInterval()).grace)
    _, offset = follow(folder.events.path)
    asked = Submission(submitted=datetime.now(UTC).isoformat(timespec="seconds"), offset=offset)
    write_submission(folder, asked)
    return write_submission(folder, asked.model_copy(update={"run_id": executor.start(folder.path)}))


def is_superlink_kept_running(federation: FederationFolder) -> bool:
    """Return whether `cotune server start` runs for the federation: then a SuperLink that is away comes back."""
    return is_running(federation.superlink)


def retry_while_kept_running(
    call: Callable[[], _Answer], kept_running: Callable[[], bool], notify: Observer, pace: PollInterval | None = None
) -> _Answer:
    """Make a call to the SuperLink; while it is being brought back, wait and make the call again.

    Args:
        call: May be made twice.
        kept_running: Whether somebody brings the SuperLink back.
        notify: Observer of `superlink_lost` and `superlink_back`.
        pace: How often it is tried.

    Raises:
        SuperLinkUnreachable: Where nobody brings it back.
    """
    away = False
    while True:
        try:
            answer = call()
        except SuperLinkUnreachable:
            if not kept_running():
                raise
            if not away:
                notify("superlink_lost", {})
            away = True
            time.sleep((pace or PollInterval()).poll)
        else:
            if away:
                notify("superlink_back", {})
            return answer


def run_to_completion(
    folder: RunFolder,
    executor: Executor,
    notify: Observer,
    pace: PollInterval | None = None,
    kept_running: Callable[[], bool] = lambda: False,
) -> None:
    """Hand a run over and follow it until its report is written. What happens is told as events, as in events.jsonl.

    What ends without a word is handed over again; what says why it failed is not. Interrupted, it stops the run first.

    Args:
        folder: Of the run.
        executor: The SuperLink.
        notify: Observer of every event.
        pace: How often it is looked.
        kept_running: Whether somebody brings a SuperLink back that is away at first; later it is waited for in any case.

    Raises:
        RunError: Where the run failed, or the SuperLink is away at first and nobody brings it back.
    """
    pace = pace or PollInterval()
    try:
        first = retry_while_kept_running(lambda: submit(folder, executor, pace), kept_running, notify, pace)
        ending = _follow_attempt(folder, executor, first, notify, pace)
        tries = 1
        while ending.event is None:
            tries = 1 if ending.progress else tries + 1
            if tries > _MAX_TRIES:
                raise RunError(
                    f"the run ended {_MAX_TRIES} times without finishing a round ({ending.reason}): see the logs in the"
                    " federation's superlink folder, then continue with --resume",
                    code="run.keeps_ending",
                )
            wait = pace.again * 2 ** (tries - 1)
            notify("run_lost", {"reason": ending.reason, "seconds": wait})
            time.sleep(wait)
            ending = _retry(folder, executor, notify, pace)
    except KeyboardInterrupt:
        notify("run_stopping", {})
        _stop(folder, executor, pace)
        raise
    if ending.event == "run_failed":
        raise RunError(
            ending.reason if "--resume" in ending.reason else f"{ending.reason}; continue with --resume", code="run.failed"
        )


@dataclass(frozen=True)
class _AttemptEnd:
    """Of an attempt. event: its last word; None where it ended without one."""

    event: str | None
    reason: str
    progress: bool = False


def _follow_attempt(
    folder: RunFolder, executor: Executor, ticket: Submission, notify: Observer, pace: PollInterval
) -> _AttemptEnd:
    """Tells what happens until the attempt ends."""
    offset = ticket.offset
    begun = False
    progress = False
    reachable = True
    while True:
        reason, reached = _get_end_reason(executor, ticket)  # asked first: whatever was written before is read below
        if reached != reachable:
            reachable = reached
            notify("superlink_back" if reached else "superlink_lost", {})
        held = is_running(folder.path) if begun else True
        events, offset = follow(folder.events.path, offset)
        for fields in events:
            event = _report_event(fields, notify)
            begun = begun or event in _STARTING_EVENTS
            progress = progress or event == "round_finished"
            if event in _FINAL_EVENTS:
                return _AttemptEnd(event, str(fields.get("reason", "")), progress)
        if reason is not None or not held:
            return _AttemptEnd(None, reason or "its process died", progress)
        time.sleep(pace.poll)


def _report_event(event: Event, notify: Observer) -> str:
    notify(event.event, event.fields)
    return event.event


def _get_end_reason(executor: Executor, ticket: Submission) -> tuple[str | None, bool]:
    """Why the attempt is over, as far as the SuperLink knows, or None; and whether it could be reached."""
    assert ticket.run_id is not None, "an attempt that is watched was handed over"
    try:
        state = executor.state(ticket.run_id)
    except RunError:
        return None, False
    if state is None:
        return "the SuperLink does not know it any more", True
    if state.status != "finished":
        return None, True
    how = f": {state.details[:200]}" if state.details else ""
    return f"its process ended ({state.outcome}){how}", True


def _retry(folder: RunFolder, executor: Executor, notify: Observer, pace: PollInterval) -> _AttemptEnd:
    """Another attempt, once the SuperLink answers."""
    try:
        retry_while_kept_running(executor.running, lambda: True, notify, pace)
        return _follow_attempt(folder, executor, submit(folder, executor, pace), notify, pace)
    except RunError as error:
        return _AttemptEnd(None, str(error))


def _stop(folder: RunFolder, executor: Executor, pace: PollInterval) -> None:
    """Ends the present attempt, at the SuperLink and on this machine."""
    with suppress(RunError):  # the SuperLink is away, or has ended the run itself
        ticket = read_submission(folder)
        known = () if ticket is None or ticket.run_id is None else (ticket.run_id,)
        for run_id in known or executor.running():
            executor.stop(run_id)
    wait_until_stopped(folder.path, pace.grace)


def _get_running_id(folder: RunFolder, ticket: Submission, executor: Executor) -> int | None:
    """The id of an attempt that goes on, or None."""
    events, _ = follow(folder.events.path, ticket.offset)
    if any(event.get("event") in _FINAL_EVENTS for event in events):
        return None
    if ticket.run_id is None:
        running = executor.running()  # the SuperLink is this federation's alone, and plays one run at a time
        return running[-1] if running else None
    state = executor.state(ticket.run_id)
    if state is None or state.status == "finished":
        return None
    if any(event.get("event") in _STARTING_EVENTS for event in events) and not is_running(folder.path):
        executor.stop(ticket.run_id)  # its process died, which the SuperLink notices after a minute
        return None
    return ticket.run_id
