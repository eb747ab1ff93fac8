"""Processes that a supervisor keeps running: they are restarted with growing delays, and their logs are kept short."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from cotune.errors import RunError
from cotune.printable import printable
from cotune.server.deployment.execution.process_record import find_session_processes, terminate_all

MIN_UPTIME_SECONDS = 20.0  # a process that ends sooner counts as failed at its start
MAX_EARLY_EXITS = 5
MAX_LOG_BYTES = 32 * 2**20
MIN_RESTART_BACKOFF = 0.5
MAX_RESTART_BACKOFF = 30.0
_GRACE_SECONDS = 2.0  # for child processes that an ended process leaves behind
# of a log
_LOG_TAIL_BYTES = 16384
_MAX_LINES = 40
_MAX_LINE_LENGTH = 300
_NO_OUTPUT = "it has said nothing"
_EXCEPTION_LINE = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Warning)\b.*|.*\b(ERROR|CRITICAL)\b.*")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r"[\u2500-\u257f]|\^{2,}|~{2,}")  # box drawings, carets


class SupervisedProcess:
    """A process that is restarted when it ends. It has its own session, so that all its child processes can be found.

    Args:
        name: Of the process, for messages.
        command: The program and its arguments.
        log: The file that its output is appended to; one previous file is kept.
        environment: Of the process.
        say: Called with a line when it ends or cannot be started.
        clock: Returns the time in seconds.
    """

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
        self._restart_at = clock()
        self._early_exits = 0
        self._is_proven = False
        self._previous = log.with_name(f"{log.name}.1")
        if log.exists():
            log.replace(self._previous)

    def poll(self) -> bool:
        """Start the process if it does not run and its delay has passed.

        Returns:
            Whether it was started.

        Raises:
            RunError: If it keeps ending right after its start, or cannot be started; never after `restart_forever`.
        """
        if self._process is None:
            if self._clock() < self._restart_at:
                return False
            return self._start()
        if (code := self._process.poll()) is not None:
            self._handle_exit(code)
        else:
            self._truncate_log()
        return False

    def restart_forever(self) -> None:
        """Never raise again: the process was ready once, so whatever ends it, such as a locked database, is temporary."""
        self._is_proven = True

    @property
    def leader(self) -> int | None:
        """The number of the process and its session; None while it does not run."""
        return None if self._process is None else self._process.pid

    def forget_ended(self) -> None:
        """Forget the process, which was ended from outside."""
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
            if not self._is_proven:
                raise RunError(f"{problem}: check the permissions and the space there", code="run.process_not_started") from None
            self._schedule_restart(problem)
            return False
        return True

    def _handle_exit(self, code: int) -> None:
        how = f"was ended by signal {-code}" if code < 0 else f"has ended with code {code}"
        terminate_all(running([self]), _GRACE_SECONDS)  # child processes are useless without it
        self._process = None
        self._early_exits = self._early_exits + 1 if self._clock() - self._started < MIN_UPTIME_SECONDS else 0
        if self._early_exits >= MAX_EARLY_EXITS and not self._is_proven:
            raise RunError(
                f"the {self.name} {how} {MAX_EARLY_EXITS} times in a row, at once: {self._read_reason()} ({self._log})",
                code="run.process_keeps_ending",
            )
        self._schedule_restart(f"the {self.name} {how} ({self._read_reason()})")

    def _schedule_restart(self, problem: str) -> None:
        wait = min(MAX_RESTART_BACKOFF, MIN_RESTART_BACKOFF * 2 ** min(10, max(0, self._early_exits - 1)))
        self._restart_at = self._clock() + wait
        self._say(f"{problem}; it is started again in {wait:g} s")

    def _truncate_log(self) -> None:
        with suppress(OSError):  # a failure here must not end the process
            if self._log.stat().st_size > MAX_LOG_BYTES:
                shutil.copyfile(self._log, self._previous)
                os.truncate(self._log, 0)  # the process appends, so it continues from there

    def _read_reason(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - _LOG_TAIL_BYTES))
                return extract_reason(log.read().decode(errors="replace"))
        except OSError:
            return _NO_OUTPUT


def extract_reason(text: str) -> str:
    """Return the line of a log that states why a process ended: the last exception or error, else the last line with words.

    >>> extract_reason("Traceback:\\n  File x\\nValueError: no room\\nFor more information check: https://x")
    'ValueError: no room'
    """
    lines = [shown for line in text.splitlines() if (shown := _clean_line(line))]
    raised = next((line for line in reversed(lines[-_MAX_LINES:]) if _EXCEPTION_LINE.match(line)), None)
    return (raised or (lines[-1] if lines else _NO_OUTPUT))[:_MAX_LINE_LENGTH]


def _clean_line(line: str) -> str:
    """Return a line without colors and frames; "" if it has no words, or only refers to further reading."""
    plain = printable(_FRAME.sub("", _COLOR.sub("", line)).strip())
    return "" if not re.search(r"\w{2}", plain) or plain.startswith("For more information check") else plain


def running(children: Iterable[SupervisedProcess]) -> Iterator[psutil.Process]:
    """Yield the processes and all their descendants."""
    yield from find_session_processes({child.leader for child in children if child.leader is not None})


def stop(children: Iterable[SupervisedProcess], grace: float) -> None:
    """Terminate the processes and all their descendants; kill those that still run after `grace` seconds."""
    kept = list(children)
    for _ in range(2):  # the second time for processes that were started in the meantime
        terminate_all(running(kept), grace)
    for child in kept:
        child.forget_ended()
