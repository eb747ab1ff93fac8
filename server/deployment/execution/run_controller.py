"""Control a run on the SuperLink: submit it, follow it, submit it again if it was lost, and stop it.

The SuperLink's executor runs it in its own process, which holds the lock of the run's folder: a run is running if and only if the
lock is held. A process that follows a run may be killed and started again without affecting the run. The last submission is in
superlink.json in the run's folder.
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
    """Calls to the SuperLink; each raises SuperLinkUnreachable if it does not answer."""

    def start(self, run: Path) -> int:
        """Start the run of a folder, and return the SuperLink's id for it."""
        ...

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        ...

    def state(self, run_id: int) -> RunState | None:
        """Return the state of a run; None if the SuperLink does not know it."""
        ...

    def running(self) -> tuple[int, ...]:
        """Return the ids of the runs that are not over."""
        ...


@dataclass(frozen=True)
class PollInterval:
    """Intervals and timeouts, in seconds.

    Attributes:
        poll: Between two polls of a run.
        again: Before a lost run is submitted again; doubled with every attempt.
        grace: For the process of a run to end by itself, after the SuperLink has given it up.
    """

    poll: float = 0.5
    again: float = 2.0  # doubled with every try
    grace: float = 10.0


def newest(federation: FederationFolder, name: str | None = None) -> RunFolder:
    """Return the run with a name, by default the newest run.

    Raises:
        RunError: If there is none.
    """
    runs = [path for path in federation.runs() if name in (None, path.name)]
    if not runs:
        known = f"called {name[:100]!r} " if name else ""
        raise RunError(f"{federation.path} has no run {known}to go on with: begin one without --resume", code="run.unknown_run")
    return RunFolder(runs[-1])


def check_none_unfinished(federation: FederationFolder, executor: Executor, *, leave: bool) -> None:
    """Check that a new run may start.

    Args:
        federation: The federation.
        executor: The SuperLink.
        leave: Whether an unfinished run that is not running may be abandoned.

    Raises:
        RunError: If a run is running, or is unfinished and may not be abandoned.
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
    """Prevent other processes from submitting or following runs of the federation during the block.

    Raises:
        RunError: If another process does so already.
    """
    try:
        federation.files.runs.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{federation.path} cannot be written ({error.strerror}): correct its permissions", code="run.not_writable"
        ) from None
    with lock_folder(federation.files.runs):
        yield


def submit(folder: RunFolder, executor: Executor, pace: PollInterval | None = None) -> Submission:
    """Submit a run to the SuperLink, unless it is running already.

    Args:
        folder: Of the run.
        executor: The SuperLink.
        pace: Its `grace` is how long a process that still executes the run may take to end.

    Returns:
        The submission that is running.

    Raises:
        RunError: If the SuperLink does not answer, or the process of an earlier attempt cannot be ended.
    """
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
    """Return whether `cotune server start` runs for the federation and would restart its SuperLink."""
    return is_running(federation.superlink)


def retry_while_kept_running(
    call: Callable[[], _Answer], kept_running: Callable[[], bool], notify: Observer, pace: PollInterval | None = None
) -> _Answer:
    """Call the SuperLink, and repeat the call while the SuperLink is being restarted.

    Args:
        call: It must be safe to repeat.
        kept_running: Returns whether a supervisor restarts the SuperLink.
        notify: Observer of `superlink_lost` and `superlink_back`.
        pace: Interval of the attempts.

    Raises:
        SuperLinkUnreachable: If it does not answer and no supervisor restarts it.
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
    """Submit a run and follow it until its report is written.

    An attempt that ends without an event that gives a reason is submitted again; one that states why it failed is not. An
    interrupt stops the run first.

    Args:
        folder: Of the run.
        executor: The SuperLink.
        notify: Observer of every event, as in events.jsonl.
        pace: Interval of polls.
        kept_running: Returns whether a supervisor restarts the SuperLink. It decides only at the start; later, an unreachable
            SuperLink is always waited for.

    Raises:
        RunError: If the run failed, or the SuperLink is unreachable at the start and no supervisor restarts it.
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
    """How an attempt ended.

    Attributes:
        event: The event that ended it; None if it ended without one.
        reason: Why, in words.
        progress: Whether it finished a round.
    """

    event: str | None
    reason: str
    progress: bool = False


def _follow_attempt(
    folder: RunFolder, executor: Executor, ticket: Submission, notify: Observer, pace: PollInterval
) -> _AttemptEnd:
    """Pass events on until the attempt ends."""
    offset = ticket.offset
    begun = False
    progress = False
    reachable = True
    while True:
        reason, reached = _get_end_reason(executor, ticket)  # asked first, so that all events written before are read below
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
    """Return (why the attempt is over according to the SuperLink, or None; whether the SuperLink answered)."""
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
    """Submit the run again once the SuperLink answers, and follow that attempt."""
    try:
        retry_while_kept_running(executor.running, lambda: True, notify, pace)
        return _follow_attempt(folder, executor, submit(folder, executor, pace), notify, pace)
    except RunError as error:
        return _AttemptEnd(None, str(error))


def _stop(folder: RunFolder, executor: Executor, pace: PollInterval) -> None:
    """End the current attempt, at the SuperLink and on this machine."""
    with suppress(RunError):  # the SuperLink does not answer, or has ended the run itself
        ticket = read_submission(folder)
        known = () if ticket is None or ticket.run_id is None else (ticket.run_id,)
        for run_id in known or executor.running():
            executor.stop(run_id)
    wait_until_stopped(folder.path, pace.grace)


def _get_running_id(folder: RunFolder, ticket: Submission, executor: Executor) -> int | None:
    """Return the id of the attempt if it is still running, else None."""
    events, _ = follow(folder.events.path, ticket.offset)
    if any(event.get("event") in _FINAL_EVENTS for event in events):
        return None
    if ticket.run_id is None:
        running = executor.running()  # the SuperLink belongs to this federation only, and executes one run at a time
        return running[-1] if running else None
    state = executor.state(ticket.run_id)
    if state is None or state.status == "finished":
        return None
    if any(event.get("event") in _STARTING_EVENTS for event in events) and not is_running(folder.path):
        executor.stop(ticket.run_id)  # its process died, which the SuperLink notices after a minute
        return None
    return ticket.run_id
