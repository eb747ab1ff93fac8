"""Which process plays a run: the one that holds the lock of the run's folder."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cotune.models.errors import RunError
from cotune.server.run_folder import keep_others_off

_LOOK_SECONDS = 0.1


def is_played(run: Path) -> bool:
    """Whether a process holds the lock of the run's folder."""
    if not (run / ".lock").exists():
        return False
    try:
        with keep_others_off(run, patience=0.0):
            return False
    except RunError:
        return True


def await_end(run: Path, grace: float) -> None:
    """Until nobody plays the run: a process that the SuperLink has given up is asked to end after `grace` seconds, then killed.

    Raises RunError.
    """
    for ask in (None, signal.SIGINT, signal.SIGKILL):
        if ask is not None:
            for process in _players(run):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(ask)
        deadline = time.monotonic() + grace
        while is_played(run):
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_SECONDS)
        else:
            return
    raise RunError(f"a process that this user may not end is working on {run}: end it, then continue with --resume")


def _players(run: Path) -> list[psutil.Process]:
    """The processes that have the run's lock open."""
    lock, found = str(run / ".lock"), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(file.path == lock for file in process.open_files()):
                found.append(process)
    return found
