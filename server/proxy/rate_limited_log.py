"""A log that no client can flood: a few lines of each kind per minute, then the number of omitted ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

LINES = 5
SECONDS = 60.0
_MAX_KINDS = 1000


@dataclass
class _Kind:
    since: float
    lines: int = 0
    left_out: int = 0


class RateLimitedLog:
    """Writes at most five lines of each kind per minute.

    Args:
        log: Writes a line.
        clock: Returns the time in seconds.
    """

    def __init__(self, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}

    def write(self, kind: str, line: str) -> None:
        """Write a line, unless too many of its kind were written in this minute."""
        now = self._clock()
        found = self._kinds.get(kind)
        if found is None or now - found.since >= SECONDS:
            if found is not None and found.left_out:
                self._log(f"{found.left_out} more lines like the following were left out")
            self._kinds.pop(kind, None)
            found = self._kinds[kind] = _Kind(now)
            while len(self._kinds) > _MAX_KINDS:
                del self._kinds[next(iter(self._kinds))]
        if found.lines < LINES:
            found.lines += 1
            self._log(line)
        else:
            found.left_out += 1
