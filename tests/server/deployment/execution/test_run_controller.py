"""Runs on a SuperLink that forgets, refuses and dies, followed by a process that is killed and comes back."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotune.errors import RunError
from cotune.flower.control_client import RunState
from cotune.server.deployment.execution.run_controller import (
    PollInterval,
    check_none_unfinished,
    is_superlink_kept_running,
    lock_runs,
    newest,
    run_to_completion,
    submit,
)
from cotune.server.deployment.execution.run_process import is_running
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.new_run import create_run
from cotune.server.runs.events import Events
from cotune.server.runs.run_folder import RunFolder, lock_folder
from tests.support.events import make_event
from tests.support.failures import fails_with
from tests.support.federations import FakeSuperLink, Step, away, founded
from tests.support.unreliable_grid import full_disk

PACE = PollInterval(poll=0.01, again=0.01, grace=0.3)
GOING = RunState("running")
HOLDER = """
import fcntl, signal, sys, time
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def federation(tmp_path: Path, base_model: Callable[[str], Path]) -> FederationFolder:
    return founded(tmp_path / "fed", base_model("bert"), "a", "b")


@pytest.fixture
def run(federation: FederationFolder) -> RunFolder:
    return create_run(federation, name="one")


@pytest.fixture
def held(run: RunFolder) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A process that holds the run's lock, as one does that plays it."""
    started: list[subprocess.Popen[str]] = []

    def hold(kind: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLDER, str(run.path / ".lock"), kind]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def tells(run: RunFolder, event: str, **fields: Any) -> Step:
    """The run goes on, and writes an event."""

    def step(run_id: int) -> RunState:
        Events(run.path / "events.jsonl").write(make_event(event, **fields))
        return GOING

    return step


def going(run_id: int) -> RunState:
    return GOING


def forgotten(run_id: int) -> None:
    return None


def heard(run: RunFolder, superlink: FakeSuperLink) -> list[tuple[str, dict[str, Any]]]:
    told: list[tuple[str, dict[str, Any]]] = []
    run_to_completion(run, superlink, lambda event, fields: told.append((event, fields)), PACE)
    return told


def ticket(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "superlink.json").read_bytes())
    return found


def test_run_events_are_reported_in_order_until_the_report(run: RunFolder) -> None:
    superlink = FakeSuperLink([[going, tells(run, "round_finished", round=1), going, tells(run, "run_finalized", summary="s")]])
    assert heard(run, superlink) == [("round_finished", {"round": 1}), ("run_finalized", {"summary": "s"})]
    assert superlink.started == [run.path]
    assert ticket(run)["run_id"] == 101


def test_a_run_that_dies_without_a_word_is_handed_over_again(run: RunFolder) -> None:
    superlink = FakeSuperLink([[going], [forgotten], [tells(run, "run_finalized")]])
    told = heard(run, superlink)
    assert [event for event, _ in told] == ["run_lost", "run_lost", "run_finalized"]
    assert [fields["reason"] for _, fields in told[:2]] == [
        "its process ended (failed): lost",
        "the SuperLink does not know it any more",
    ]
    assert told[1][1]["seconds"] > told[0][1]["seconds"]
    assert len(superlink.started) == 3


def test_rounds_that_are_finished_between_give_it_new_tries(run: RunFolder) -> None:
    one_round_each = [[tells(run, "round_finished", round=i)] for i in range(1, 9)]
    superlink = FakeSuperLink([*one_round_each, [tells(run, "run_finalized")]])
    assert [fields["round"] for event, fields in heard(run, superlink) if event == "round_finished"] == list(range(1, 9))
    assert len(superlink.started) == 9


def test_without_progress_it_gives_up(run: RunFolder) -> None:
    superlink = FakeSuperLink()
    with fails_with("run.keeps_ending", "5"):
        heard(run, superlink)
    assert len(superlink.started) == 5


def test_what_the_run_itself_says_is_the_end(run: RunFolder) -> None:
    superlink = FakeSuperLink([[tells(run, "run_failed", round=1, reason="round 1 got 0 of 2 updates")]])
    with fails_with("run.failed", "1", "0", "2"):
        heard(run, superlink)
    assert len(superlink.started) == 1


def test_an_old_failure_is_not_that_of_the_next_attempt(run: RunFolder) -> None:
    failed = FakeSuperLink([[tells(run, "run_failed", reason="too few")]])
    with pytest.raises(RunError):
        heard(run, failed)
    assert [event for event, _ in heard(run, FakeSuperLink([[going, tells(run, "run_finalized")]]))] == ["run_finalized"]


def test_a_superlink_that_is_away_is_waited_for(run: RunFolder) -> None:
    superlink = FakeSuperLink([[going, away, away, tells(run, "run_finalized")]])
    assert [event for event, _ in heard(run, superlink)] == ["superlink_lost", "superlink_back", "run_finalized"]
    assert len(superlink.started) == 1


def test_superlink_absent_between_attempts_is_awaited(run: RunFolder) -> None:
    class Restarting(FakeSuperLink):
        answers = iter([away, away])

        def running(self) -> tuple[int, ...]:
            for answer in self.answers:
                answer(0)
            return ()

    superlink = Restarting([[], [tells(run, "run_finalized")]])
    assert [event for event, _ in heard(run, superlink)] == ["run_lost", "superlink_lost", "superlink_back", "run_finalized"]


def test_a_superlink_that_is_away_at_first_is_said_at_once(run: RunFolder) -> None:
    class Away(FakeSuperLink):
        def start(self, run: Path) -> int:
            away(0)
            raise AssertionError

    with fails_with("run.superlink_unreachable"):
        heard(run, Away())


def test_a_superlink_that_is_brought_back_is_waited_for_at_first(run: RunFolder) -> None:
    """A run that is gone on with in the seconds after a kill of the SuperLink ended at once."""

    class Restarting(FakeSuperLink):
        answers = iter([away, away])

        def start(self, run: Path) -> int:
            for answer in self.answers:
                answer(0)
            return super().start(run)

    superlink = Restarting([[tells(run, "run_finalized")]])
    told = list[str]()
    run_to_completion(run, superlink, lambda event, fields: told.append(event), PACE, kept_running=lambda: True)
    assert told == ["superlink_lost", "superlink_back", "run_finalized"]
    assert len(superlink.started) == 1


def test_a_server_that_runs_is_known_by_its_lock(federation: FederationFolder) -> None:
    federation.superlink.mkdir(exist_ok=True)
    assert not is_superlink_kept_running(federation)
    with lock_folder(federation.superlink):
        assert is_superlink_kept_running(federation)
    assert not is_superlink_kept_running(federation)


def test_returning_follower_gets_this_attempt_from_its_start(run: RunFolder) -> None:
    run.events.write(make_event("of an earlier attempt"))
    superlink = FakeSuperLink([[going, going, tells(run, "run_finalized")]])
    submit(run, superlink, PACE)
    run.events.write(make_event("round_finished", round=1))
    assert heard(run, superlink) == [("round_finished", {"round": 1}), ("run_finalized", {})]
    assert len(superlink.started) == 1


@pytest.mark.parametrize(("known", "starts", "run_id"), [((7,), 0, 7), ((), 1, 101)])
def test_controller_killed_in_submission_finds_the_run(run: RunFolder, known: tuple[int, ...], starts: int, run_id: int) -> None:
    class Killed(FakeSuperLink):
        def start(self, run: Path) -> int:
            raise SystemExit

    with pytest.raises(SystemExit):
        submit(run, Killed(), PACE)
    assert ticket(run)["run_id"] is None
    superlink = FakeSuperLink(known=known)
    assert submit(run, superlink, PACE).run_id == ticket(run)["run_id"] == run_id
    assert len(superlink.started) == starts


@pytest.mark.parametrize(("kind", "ended_by"), [("hearing", signal.SIGINT), ("deaf", signal.SIGKILL)])
def test_no_second_process_plays_before_the_first_has_ended(
    run: RunFolder, held: Callable[[str], subprocess.Popen[str]], kind: str, ended_by: signal.Signals
) -> None:
    holder = held(kind)
    assert is_running(run.path)

    class Watching(FakeSuperLink):
        def start(self, run: Path) -> int:
            assert not is_running(run)
            return super().start(run)

    submit(run, Watching(), PACE)
    assert holder.wait(600) == -ended_by


@pytest.mark.parametrize("first", ["run_started", "delivery_started"])
def test_dead_process_is_noticed_before_the_superlink_does(
    run: RunFolder, held: Callable[[str], subprocess.Popen[str]], first: str
) -> None:
    """Also one that only hands out the model of a run whose rounds are all finished."""

    def dies(run_id: int) -> RunState:
        holder = held("hearing")
        run.events.write(make_event(first))
        threading.Timer(0.1, holder.kill).start()
        return GOING

    def concludes(run_id: int) -> RunState:
        run.events.write(make_event("run_finalized"))
        return GOING

    superlink = FakeSuperLink([[dies, *[going] * 1000], [concludes]])
    assert [(event, fields.get("reason")) for event, fields in heard(run, superlink)] == [
        (first, None),
        ("run_lost", "its process died"),
        ("run_finalized", None),
    ]
    assert (len(superlink.started), superlink.stopped) == (2, [101])


def test_a_full_disk_is_said_before_anything_is_handed_over(run: RunFolder) -> None:
    superlink = FakeSuperLink([[going]])
    with full_disk(10), pytest.raises(RunError, match="cannot be written .*free space for it.*--resume"):
        submit(run, superlink, PACE)
    assert superlink.started == []


def test_a_process_that_ends_by_itself_is_left_to_it(run: RunFolder) -> None:
    with (run.path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.1, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        submit(run, FakeSuperLink(), PollInterval(poll=0.01, grace=30))
        assert not is_running(run.path)


def test_interrupted_it_stops_the_run_and_its_process(run: RunFolder, held: Callable[[str], subprocess.Popen[str]]) -> None:
    holders: list[subprocess.Popen[str]] = []

    def interrupt(run_id: int) -> RunState:
        holders.append(held("hearing"))
        raise KeyboardInterrupt

    superlink = FakeSuperLink([[interrupt]])
    told = list[str]()
    with pytest.raises(KeyboardInterrupt):
        run_to_completion(run, superlink, lambda event, fields: told.append(event), PACE)
    assert (superlink.stopped, told) == ([101], ["run_stopping"])
    assert holders[0].wait(600) == -signal.SIGINT


def test_a_run_is_left_behind_only_where_that_is_said(federation: FederationFolder, run: RunFolder) -> None:
    with fails_with("run.unfinished_run"):
        check_none_unfinished(federation, FakeSuperLink(), leave=False)
    check_none_unfinished(federation, FakeSuperLink(), leave=True)
    run.stop("enough")
    check_none_unfinished(federation, FakeSuperLink(), leave=False)


@pytest.mark.parametrize("leave", [True, False])
def test_a_run_that_goes_on_is_never_left_behind(
    federation: FederationFolder, run: RunFolder, held: Callable[[str], subprocess.Popen[str]], leave: bool
) -> None:
    held("hearing")
    with fails_with("run.already_running"):
        check_none_unfinished(federation, FakeSuperLink(), leave=leave)


def test_submitted_run_that_has_not_begun_is_not_left_behind(federation: FederationFolder, run: RunFolder) -> None:
    superlink = FakeSuperLink([[going]])
    submit(run, superlink, PACE)
    with fails_with("run.already_running"):
        check_none_unfinished(federation, superlink, leave=True)
    check_none_unfinished(federation, superlink, leave=True)  # by now it has failed


def test_the_newest_run_is_gone_on_with_or_the_one_that_is_named(federation: FederationFolder) -> None:
    with fails_with("run.unknown_run"):
        newest(federation)
    for name in ("begun-first", "another"):
        create_run(federation, name=name)
    assert newest(federation).path.name == "another"
    assert newest(federation, "begun-first").path.name == "begun-first"
    with fails_with("run.unknown_run", "c"):
        newest(federation, "c")


def test_one_process_at_a_time_follows_a_federation(federation: FederationFolder) -> None:
    with lock_runs(federation), fails_with("run.locked"), lock_runs(federation):
        pass
    with lock_runs(federation):
        pass


def test_a_damaged_ticket_is_said(run: RunFolder) -> None:
    (run.path / "superlink.json").write_text("{")
    with fails_with("run.damaged_document", "superlink.json"):
        submit(run, FakeSuperLink(), PACE)
