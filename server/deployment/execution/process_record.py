"""Record the processes that a supervisor has started, so that the next supervisor can end them if it was killed.

A process is identified by its number and its start time, as numbers are reused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

from cotune.errors import RunError
from cotune.storage.json_documents import JsonDocument

Identity = tuple[int, float]  # (process number, start time)


class _Processes(BaseModel):
    """The document: the processes, and the boot of the machine to which they belong, as numbers are reused after a reboot."""

    boot: str
    processes: list[Identity]


class ProcessRecord:
    """The file processes.json, written when processes start or end, and read by the next supervisor.

    Args:
        file: The file.
        say: Called with a line if the file cannot be written.
    """

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self._file = file
        self._document = JsonDocument(file, _Processes)
        self._say = say
        self._written: list[Identity] | None = None
        self._failed = False

    def keep(self, processes: Iterable[psutil.Process]) -> None:
        """Record which processes run. A full disk is reported once and not raised; the next call tries again."""
        found = sorted(identity for process in processes if (identity := _get_identity(process)))
        if found == self._written:
            return
        try:
            self._document.write(_Processes(boot=_get_boot_id(), processes=found))
        except OSError as error:
            if not self._failed:
                self._say(f"WARNING: {self._file} cannot be written ({error.strerror}): free space, or check its permissions")
            self._failed = True
        else:
            self._written = found
            self._failed = False

    def left(self) -> list[psutil.Process]:
        """Return the recorded processes that still run, and all that they have started; none if the file is damaged."""
        try:
            kept = self._document.read()
        except RunError:
            return []
        known = set(kept.processes) if kept is not None and kept.boot == _get_boot_id() else set()
        return list({process for number, started in known for process in _iterate_family(number, started)})


def find_session_processes(leaders: Collection[int]) -> Iterator[psutil.Process]:
    """Yield the processes of sessions.

    Args:
        leaders: Numbers of the processes that started the sessions, whether they still run or not.
    """
    for number in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(number) in leaders and _is_running(process := psutil.Process(number)):
                yield process


def terminate_all(processes: Iterable[psutil.Process], grace: float) -> int:
    """Terminate processes, and kill those that still run after `grace` seconds.

    Returns:
        The number of processes.
    """
    asked = list(processes)
    for process in asked:
        with suppress(psutil.Error):
            process.terminate()
    for process in (stubborn := _wait_for(grace, asked)):
        with suppress(psutil.Error):
            process.kill()
    _wait_for(grace, stubborn)
    return len(asked)


def _wait_for(seconds: float, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Wait until the processes have ended, for `seconds` at most; return those that still run."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if _is_running(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _is_running(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _iterate_family(number: int, started: float) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        process = psutil.Process(number)
        if _get_identity(process) == (number, started):
            yield process
            yield from process.children(recursive=True)


def _get_identity(process: psutil.Process) -> Identity | None:
    """Return number and start of a process; on Linux in ticks since boot, as psutil's time changes when the clock is set."""
    try:
        return process.pid, float(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError):
        with suppress(psutil.Error):
            return process.pid, process.create_time()
    return None


def _get_boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
