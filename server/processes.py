"""Which processes a supervisor keeps running, with all that they have started, so that none is left behind: processes.json.

A process is known by its number and by when it was started, as numbers are given out again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from cotune.models.durable import write_durably
from cotune.models.nested import json_of

Identity = tuple[int, float]  # number, and when it was started


class Record:
    """The file. It is written when what runs has changed, and read by the next supervisor."""

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self._file, self._say = file, say
        self._written: list[Identity] | None = None
        self._failed = False

    def keep(self, processes: Iterable[psutil.Process]) -> None:
        """From now on these are the ones. A full disk is said once, and is no reason to end them: the next call tries again."""
        found = sorted(identity for process in processes if (identity := _identity(process)))
        if found == self._written:
            return
        try:
            write_durably(self._file, json.dumps({"boot": _boot(), "processes": found}).encode())
        except OSError as error:
            if not self._failed:
                self._say(f"WARNING: {self._file} cannot be written ({error.strerror}): make room, or check its permissions")
            self._failed = True
        else:
            self._written, self._failed = found, False

    def left(self) -> list[psutil.Process]:
        """Those of the file that still run, with all that they have started. A damaged file names none."""
        try:
            kept = json_of(self._file.read_bytes())
            known = {(int(number), float(started)) for number, started in kept["processes"]} if kept["boot"] == _boot() else set()
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return list({process for number, started in known for process in _family(number, started)})


def sessions(leaders: Collection[int]) -> Iterator[psutil.Process]:
    """The processes of the sessions that some have begun, whether those still run or not."""
    for number in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(number) in leaders and _runs(process := psutil.Process(number)):
                yield process


def end(processes: Iterable[psutil.Process], grace: float) -> int:
    """Asks them to end, and after `grace` seconds does not ask any more. Returns how many there were."""
    asked = list(processes)
    for process in asked:
        with suppress(psutil.Error):
            process.terminate()
    for process in (stubborn := _after(grace, asked)):
        with suppress(psutil.Error):
            process.kill()
    _after(grace, stubborn)
    return len(asked)


def _after(seconds: float, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run then; returns at once when none does."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    """Not so where only its entry is left, because nobody has asked for its exit code."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _family(number: int, started: float) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        process = psutil.Process(number)
        if _identity(process) == (number, started):
            yield process
            yield from process.children(recursive=True)


def _identity(process: psutil.Process) -> Identity | None:
    """On Linux in ticks since the boot: what psutil makes of them moves when the clock is set."""
    try:
        return process.pid, float(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError):
        with suppress(psutil.Error):
            return process.pid, process.create_time()
    return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
