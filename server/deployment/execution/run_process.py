"""The process that executes a run: it holds the lock of the run's folder, and a run is running if and only if that is held."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cotune.errors import RunError
from cotune.storage.files import is_locked

_POLL_SECONDS = 0.1


def is_running(run: Path) -> bool:
    """Return whether a process holds the lock of the run's folder."""
    return is_locked(run / ".lock")


def wait_until_stopped(run: Path, grace: float) -> None:
    """Wait until no process executes the run.

    Args:
        run: The run's folder.
        grace: Seconds after which the process is interrupted; after as many again, it is killed.

    Raises:
        RunError: If the process cannot be ended.
    """
    for ask in (None, signal.SIGINT, signal.SIGKILL):
        if ask is not None:
            for process in _find_lock_holders(run):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(ask)
        deadline = time.monotonic() + grace
        while is_running(run):
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise RunError(
        f"a process that this user may not end is working on {run}: end it, then continue with --resume",
        code="run.process_not_ended",
    )


def _find_lock_holders(run: Path) -> list[psutil.Process]:
    """Return the processes that have the run's lock file open."""
    lock = str(run / ".lock")
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(file.path == lock for file in process.open_files()):
                found.append(process)
    return found
