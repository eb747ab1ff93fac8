"""Worker processes, for real: they answer, are killed, and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from cotune.worker_process import WorkerProcess, receive_all

PARENT = """
import os, signal
from cotune.worker_process import WorkerProcess
from tests.test_worker_process import wait_for_ever

if __name__ == "__main__":
    worker = WorkerProcess(wait_for_ever)
    print(worker.pipe.recv(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def _new_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of the tests."""
    monkeypatch.setattr(WorkerProcess, "context", multiprocessing.get_context("spawn"))


def double(pipe: Connection, offset: int) -> None:
    for number in receive_all(pipe):
        pipe.send(2 * number + offset)


def wait_for_ever(pipe: Connection) -> None:
    pipe.send(os.getpid())
    pipe.recv()


def test_work_ends_when_the_pipe_is_closed() -> None:
    worker = WorkerProcess(double, 1)
    worker.pipe.send(20)
    assert worker.pipe.recv() == 41
    worker.pipe.close()
    assert worker.wait() == 0


def test_ignored_signals() -> None:
    worker = WorkerProcess(double, 0, ignored=(signal.SIGINT, signal.SIGTERM))
    worker.pipe.send(1)
    assert worker.pipe.recv() == 2  # it has begun
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    worker.pipe.send(2)
    assert worker.pipe.recv() == 4
    worker.kill()


def test_killed() -> None:
    worker = WorkerProcess(wait_for_ever)
    worker.pipe.recv()
    worker.kill()
    assert not worker.is_alive()
    assert worker.wait() == -signal.SIGKILL


def test_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    while runs(int(parent.stdout)):
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Also False where only the entry of a process is left that nobody has waited for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
