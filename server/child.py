"""A process that is kept running: started, its output in a log, and started again when it ends, however it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from cotune.models.errors import RunError
from cotune.server.processes import end, sessions

__all__ = ["Child", "running", "stop"]

AT_ONCE_SECONDS = 20.0  # a process that ends sooner has not served anybody
ATTEMPTS = 5
LARGEST_LOG_BYTES = 32 * 2**20
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
_GRACE_SECONDS = 2.0  # for what a process that has ended leaves behind


class Child:
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
        self.name, self._command, self._log, self._environment = name, list(command), log, dict(environment)
        self._say, self._clock = say, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._again, self._early = 0.0, clock(), 0
        self._previous = log.with_name(f"{log.name}.1")
        if log.exists():
            log.replace(self._previous)

    def tend(self) -> bool:
        """Starts it where it is due, and returns whether it did.

        Raises RunError when it ends at once, again and again, or cannot be started.
        """
        if self._process is None:
            if self._clock() < self._again:
                return False
            self._start()
            return True
        if (code := self._process.poll()) is not None:
            self._ended(code)
        else:
            self._shorten_log()
        return False

    @property
    def leader(self) -> int | None:
        """The number of the process, and of its session; None while there is none."""
        return None if self._process is None else self._process.pid

    def reap(self) -> None:
        """After it was ended by others."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None

    def _start(self) -> None:
        self._started = self._clock()
        try:
            descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "ab") as log:
                self._process = subprocess.Popen(
                    self._command, env=self._environment, cwd=self._log.parent, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True, umask=0o077,
                )  # fmt: skip
        except OSError as error:
            raise RunError(f"the {self.name} cannot be started ({error}): check the permissions and the space there") from None

    def _ended(self, code: int) -> None:
        how = f"was ended by signal {-code}" if code < 0 else f"has ended with code {code}"
        end(running([self]), _GRACE_SECONDS)  # without it they serve nobody
        self._process = None
        self._early = self._early + 1 if self._clock() - self._started < AT_ONCE_SECONDS else 0
        if self._early >= ATTEMPTS:
            raise RunError(f"the {self.name} {how} {ATTEMPTS} times in a row, at once: {self._last_line()} ({self._log})")
        wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** max(0, self._early - 1))
        self._again = self._clock() + wait
        self._say(f"the {self.name} {how}; it is started again in {wait:g} s")

    def _shorten_log(self) -> None:
        with suppress(OSError):  # no reason to end what runs
            if self._log.stat().st_size > LARGEST_LOG_BYTES:
                shutil.copyfile(self._log, self._previous)
                os.truncate(self._log, 0)  # the process appends, and goes on from there

    def _last_line(self) -> str:
        try:
            lines = self._log.read_bytes()[-4096:].decode(errors="replace").split("\n")
        except OSError:
            lines = []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it has said nothing")


def running(children: Iterable[Child]) -> Iterator[psutil.Process]:
    """They, and all that they have started."""
    yield from sessions({child.leader for child in children if child.leader is not None})


def stop(children: Iterable[Child], grace: float) -> None:
    """Ends them, and all that they have started: asked first, and after `grace` seconds not any more."""
    kept = list(children)
    for _ in range(2):  # what they have started while they were ended
        end(running(kept), grace)
    for child in kept:
        child.reap()
