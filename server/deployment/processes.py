"""A process that is kept running: started, its output in a log, and started again when it ends, however it ends.

Which processes a supervisor keeps running, with all that they have started, so that none is left behind: processes.json.

A process is known by its number and by when it was started, as numbers are given out again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

from cotune.errors import RunError
from cotune.printable import printable
from cotune.storage.documents import JsonDocument

Identity = tuple[int, float]  # number, and when it was started


class _Processes(BaseModel):
    """The document: which boot of the machine the processes are of, as their numbers come again."""

    boot: str
    processes: list[Identity]


class ProcessRecord:
    """The file. It is written when what runs has changed, and read by the next supervisor."""

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self._file = file
        self._document = JsonDocument(file, _Processes)
        self._say = say
        self._written: list[Identity] | None = None
        self._failed = False

    def keep(self, processes: Iterable[psutil.Process]) -> None:
        """From now on these are the ones. A full disk is said once, and is no reason to end them: the next call tries again."""
        found = sorted(identity for process in processes if (identity := _identity(process)))
        if found == self._written:
            return
        try:
            self._document.write(_Processes(boot=_boot(), processes=found))
        except OSError as error:
            if not self._failed:
                self._say(f"WARNING: {self._file} cannot be written ({error.strerror}): make room, or check its permissions")
            self._failed = True
        else:
            self._written = found
            self._failed = False

    def left(self) -> list[psutil.Process]:
        """Those of the file that still run, with all that they have started. A damaged file names none."""
        try:
            kept = self._document.read()
        except RunError:
            return []
        known = set(kept.processes) if kept is not None and kept.boot == _boot() else set()
        return list({process for number, started in known for process in _family(number, started)})


def find_session_processes(leaders: Collection[int]) -> Iterator[psutil.Process]:
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


MIN_UPTIME_SECONDS = 20.0  # a process that ends sooner has not served anybody
MAX_EARLY_EXITS = 5
MAX_LOG_BYTES = 32 * 2**20
MIN_RESTART_BACKOFF = 0.5
MAX_RESTART_BACKOFF = 30.0
_GRACE_SECONDS = 2.0  # for what a process that has ended leaves behind
# of a log
_LOOKED_AT_BYTES = 16384
_LAST_LINES = 40
_LONGEST_LINE = 300
_NOTHING = "it has said nothing"
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Warning)\b.*|.*\b(ERROR|CRITICAL)\b.*")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r"[\u2500-\u257f]|\^{2,}|~{2,}")  # box drawings, carets


class SupervisedProcess:
    """One process, in a session of its own, so that all that it starts can be found. log: appended to; the one before is kept."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._command = list(command)
        self._log = log
        self._environment = dict(environment)
        self._say = say
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._again = clock()
        self._early = 0
        self._proven = False
        self._previous = log.with_name(f"{log.name}.1")
        if log.exists():
            log.replace(self._previous)

    def poll(self) -> bool:
        """Starts it where it is due, and returns whether it did.

        Raises RunError when it ends at once, again and again, or cannot be started, unless it is never given up.
        """
        if self._process is None:
            if self._clock() < self._again:
                return False
            return self._start()
        if (code := self._process.poll()) is not None:
            self._ended(code)
        else:
            self._shorten_log()
        return False

    def restart_forever(self) -> None:
        """Everything was ready once: what ends it now passes, such as a database that a backup has locked, or an attack."""
        self._proven = True

    @property
    def leader(self) -> int | None:
        """The number of the process, and of its session; None while there is none."""
        return None if self._process is None else self._process.pid

    def forget_ended(self) -> None:
        """After it was ended by others."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None

    def _start(self) -> bool:
        self._started = self._clock()
        try:
            descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "ab") as log:
                self._process = subprocess.Popen(
                    self._command, env=self._environment, cwd=self._log.parent, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True, umask=0o077,
                )  # fmt: skip
        except OSError as error:
            problem = f"the {self.name} cannot be started ({error})"
            if not self._proven:
                raise RunError(f"{problem}: check the permissions and the space there") from None
            self._try_again(problem)
            return False
        return True

    def _ended(self, code: int) -> None:
        how = f"was ended by signal {-code}" if code < 0 else f"has ended with code {code}"
        end(running([self]), _GRACE_SECONDS)  # without it they serve nobody
        self._process = None
        self._early = self._early + 1 if self._clock() - self._started < MIN_UPTIME_SECONDS else 0
        if self._early >= MAX_EARLY_EXITS and not self._proven:
            raise RunError(f"the {self.name} {how} {MAX_EARLY_EXITS} times in a row, at once: {self._last_line()} ({self._log})")
        self._try_again(f"the {self.name} {how} ({self._last_line()})")

    def _try_again(self, problem: str) -> None:
        wait = min(MAX_RESTART_BACKOFF, MIN_RESTART_BACKOFF * 2 ** min(10, max(0, self._early - 1)))
        self._again = self._clock() + wait
        self._say(f"{problem}; it is started again in {wait:g} s")

    def _shorten_log(self) -> None:
        with suppress(OSError):  # no reason to end what runs
            if self._log.stat().st_size > MAX_LOG_BYTES:
                shutil.copyfile(self._log, self._previous)
                os.truncate(self._log, 0)  # the process appends, and goes on from there

    def _last_line(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - _LOOKED_AT_BYTES))
                return extract_reason(log.read().decode(errors="replace"))
        except OSError:
            return _NOTHING


def extract_reason(text: str) -> str:
    """The last line that says why a process has ended: what was raised where there is one, otherwise the last that has words.

    >>> meaningful_line("Traceback:\\n  File x\\nValueError: no room\\nFor more information check: https://x")
    'ValueError: no room'
    """
    lines = [shown for line in text.splitlines() if (shown := _shown(line))]
    raised = next((line for line in reversed(lines[-_LAST_LINES:]) if _RAISED.match(line)), None)
    return (raised or (lines[-1] if lines else _NOTHING))[:_LONGEST_LINE]


def _shown(line: str) -> str:
    """Without colors and frames; nothing for a line without words, and for one that only says where to read on."""
    plain = printable(_FRAME.sub("", _COLOR.sub("", line)).strip())
    return "" if not re.search(r"\w{2}", plain) or plain.startswith("For more information check") else plain


def running(children: Iterable[SupervisedProcess]) -> Iterator[psutil.Process]:
    """They, and all that they have started."""
    yield from find_session_processes({child.leader for child in children if child.leader is not None})


def stop(children: Iterable[SupervisedProcess], grace: float) -> None:
    """Ends them, and all that they have started: asked first, and after `grace` seconds not any more."""
    kept = list(children)
    for _ in range(2):  # what they have started while they were ended
        end(running(kept), grace)
    for child in kept:
        child.forget_ended()
