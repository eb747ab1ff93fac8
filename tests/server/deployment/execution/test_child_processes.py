from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cotune.errors import RunError
from cotune.server.deployment.execution import supervised_process as module
from cotune.server.deployment.execution.supervised_process import SupervisedProcess, running, stop
from tests.support.failures import fails_with

NewChild = Callable[..., SupervisedProcess]


@pytest.fixture
def said() -> list[str]:
    return []


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new_child(tmp_path: Path, said: list[str], clock: Clock) -> Iterator[NewChild]:
    made: list[SupervisedProcess] = []

    def make(code: str) -> SupervisedProcess:
        command = [sys.executable, "-c", f"import os, sys, time\n{code}"]
        made.append(SupervisedProcess("worker", command, tmp_path / "worker.log", os.environ, said.append, clock))
        return made[-1]

    yield make
    stop(made, 1.0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tend_until_ended(child: SupervisedProcess, said: list[str]) -> None:
    seen = len(said)

    def ended() -> bool:
        child.poll()
        return len(said) > seen

    until(ended)


def test_child_runs_in_its_own_session_and_logs_its_output(new_child: NewChild, tmp_path: Path) -> None:
    child = new_child(
        "print(os.getsid(0), flush=True); open('made', 'w').close(); print('bad', file=sys.stderr); time.sleep(600)"
    )
    child.poll()
    log = tmp_path / "worker.log"
    until(lambda: "bad" in log.read_text())
    assert log.read_text().split() == [str(child.leader), "bad"]
    assert child.leader != os.getsid(0)
    assert {path.stat().st_mode & 0o777 for path in (log, tmp_path / "made")} == {0o600}


def test_child_is_restarted_after_any_exit_with_backoff(new_child: NewChild, said: list[str], clock: Clock) -> None:
    child = new_child("sys.exit(0)")
    for _ in range(3):
        child.poll()
        assert child.leader is not None
        tend_until_ended(child, said)
        child.poll()
        assert child.leader is None  # not yet
        clock.now += 10
    assert said == [
        f"the worker has ended with code 0 (it has said nothing); it is started again in {wait} s" for wait in ("0.5", "1", "2")
    ]


def test_child_that_keeps_ending_is_given_up_with_its_output(
    new_child: NewChild, said: list[str], clock: Clock, tmp_path: Path
) -> None:
    child = new_child("print('hello'); sys.exit('no room for me')")
    with pytest.raises(RunError) as error:
        for _ in range(5):
            child.poll()
            tend_until_ended(child, said)
            clock.now += 60
    assert str(error.value) == (
        f"the worker has ended with code 1 5 times in a row, at once: no room for me ({tmp_path / 'worker.log'})"
    )
    assert len(said) == 4


def test_child_that_keeps_ending_after_ready_is_not_given_up(new_child: NewChild, said: list[str], clock: Clock) -> None:
    """As an executor does whose SuperLink answers 500 for as long as a backup holds its database."""
    child = new_child("sys.exit('ValueError: the database is locked\\nFor more information check: https://x')")
    child.restart_forever()
    for _ in range(10):
        child.poll()
        tend_until_ended(child, said)
        clock.now += 30
    assert all("ValueError: the database is locked" in line for line in said)
    assert said[-1].endswith("started again in 30 s")


def test_child_that_cannot_start_after_ready_is_retried(tmp_path: Path, said: list[str], clock: Clock) -> None:
    program = tmp_path / "program"
    child = SupervisedProcess("worker", [str(program)], tmp_path / "worker.log", os.environ, said.append, clock)
    child.restart_forever()
    assert not child.poll()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    clock.now += 60
    assert child.poll()
    tend_until_ended(child, said)


def test_one_that_has_served_for_a_while_is_never_given_up(new_child: NewChild, said: list[str], clock: Clock) -> None:
    child = new_child("time.sleep(600)")
    for _ in range(7):
        child.poll()
        clock.now += 3600
        assert child.leader is not None
        os.kill(child.leader, signal.SIGKILL)
        tend_until_ended(child, said)
        clock.now += 1
    assert set(said) == {"the worker was ended by signal 9 (it has said nothing); it is started again in 0.5 s"}


def test_what_it_has_started_ends_with_it(new_child: NewChild, said: list[str], tmp_path: Path) -> None:
    child = new_child(
        "import subprocess\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\ntime.sleep(600)"
    )
    child.poll()
    until(lambda: len(list(running([child]))) == 2)
    (grandchild,) = (process for process in running([child]) if process.pid != child.leader)
    assert child.leader is not None
    os.kill(child.leader, signal.SIGKILL)
    tend_until_ended(child, said)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_all_are_stopped_together(new_child: NewChild) -> None:
    children = [new_child("time.sleep(600)") for _ in range(2)]
    for child in children:
        child.poll()
    found = list(running(children))
    assert len(found) == 2
    stop(children, 5.0)
    assert not any(process.is_running() for process in found)
    assert [child.leader for child in children] == [None, None]


def test_the_log_of_the_start_before_is_kept(new_child: NewChild, tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("before")
    new_child("print('now')").poll()
    until(lambda: (tmp_path / "worker.log").exists() and "now" in (tmp_path / "worker.log").read_text())
    assert (tmp_path / "worker.log.1").read_text() == "before"


def test_a_long_log_starts_again(new_child: NewChild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOG_BYTES", 5)
    child = new_child(
        "print('first', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint(2, flush=True); time.sleep(600)"
    )
    log = tmp_path / "worker.log"
    child.poll()
    until(lambda: log.read_text() == "first\n")
    child.poll()
    (tmp_path / "go").touch()
    until(lambda: log.read_text() == "2\n")
    assert (tmp_path / "worker.log.1").read_text() == "first\n"


def test_what_cannot_be_started_is_one_sentence(tmp_path: Path) -> None:
    with fails_with("run.process_not_started", "worker", "nowhere"):
        SupervisedProcess("worker", ["/nowhere"], tmp_path / "worker.log", {}, print).poll()
