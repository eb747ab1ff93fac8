"""The history of a run on disk: a line for each finished round, appended before the checkpoint of the round is written.

A checkpoint says how many bytes of the file are its own, and what they hash to. So its size does not grow with the rounds, and
lines beyond those bytes, of a process that was killed before its checkpoint was there, count for nothing: the next round
takes their place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cotune.errors import RunError
from cotune.reporting.documents.rounds import RoundEntry
from cotune.storage.append_only_log import START_HASH
from cotune.storage.files import sync
from cotune.storage.json_documents import parse_json


@dataclass(frozen=True)
class HistoryMark:
    """A place in the file, at the end of a line.

    Attributes:
        length: How many bytes there are before it.
        sha256: Of the last line before it, over the hash of those before and its own text.
    """

    length: int = 0
    sha256: str = START_HASH

    def after(self, line: bytes) -> HistoryMark:
        """Return the place after one more line."""
        return HistoryMark(self.length + len(line), hashlib.sha256(self.sha256.encode() + line).hexdigest())


class HistoryFile:
    """The file, written by one process at a time and read by any.

    Args:
        path: Of the file, which is created with the first entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: tuple[RoundEntry, ...] = ()  # those that the file is known to hold
        self._end = HistoryMark()

    def write(self, history: Sequence[RoundEntry]) -> HistoryMark:
        """Make the file hold a history, durably, and return its end. What the file has of it already is not written again.

        Raises:
            OSError: The file cannot be written; what earlier checkpoints count on is still there.
        """
        if not self._holds_beginning_of(history):
            self._find_common(history)
        lines = [_line(entry) for entry in history[len(self._entries) :]]
        is_new = not self.path.exists()
        with self.path.open("ab") as stream:
            stream.truncate(self._end.length)
            stream.write(b"".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        if is_new:
            sync(self.path.parent)
        self._entries = tuple(history)
        self._end = _follow(self._end, lines)
        return self._end

    def read(self, end: HistoryMark) -> tuple[RoundEntry, ...]:
        """Return the history up to a place.

        Raises:
            RunError: The file is not as it was written.
        """
        try:
            content = self._read_bytes(end.length)
            lines = content.splitlines(keepends=True)
            if _follow(HistoryMark(), lines) != end:
                raise ValueError("its lines are others than those that the checkpoint counts on")
            entries = tuple(RoundEntry.model_validate(parse_json(line)) for line in lines)
        except (OSError, ValueError) as error:
            raise RunError(
                f"the history {self.path} is damaged ({error}): restore the run's folder from a backup, or start a new run",
                code="run.damaged_history",
            ) from None
        self._entries = entries
        self._end = end
        return entries

    def _holds_beginning_of(self, history: Sequence[RoundEntry]) -> bool:
        held = len(self._entries)
        is_long_enough = self._end.length == 0 or (self.path.exists() and self.path.stat().st_size >= self._end.length)
        return is_long_enough and held <= len(history) and all(a is b for a, b in zip(self._entries, history, strict=False))

    def _find_common(self, history: Sequence[RoundEntry]) -> None:
        """Find out how many of the first lines of the file are those of a history."""
        try:
            present = self._read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            present = []
        self._entries = ()
        self._end = HistoryMark()
        for entry, line in zip(history, present, strict=False):
            if _line(entry) != line:
                break
            self._entries = (*self._entries, entry)
            self._end = self._end.after(line)

    def _read_bytes(self, count: int = -1) -> bytes:
        """The first bytes of the file; all of it without a count."""
        if count == 0:
            return b""
        with self.path.open("rb") as stream:
            return stream.read(count)


def _line(entry: RoundEntry) -> bytes:
    """ASCII, so that no character of a text ends a line."""
    return json.dumps(RoundEntry.model_validate(entry).as_json()).encode() + b"\n"


def _follow(start: HistoryMark, lines: Iterable[bytes]) -> HistoryMark:
    end = start
    for line in lines:
        end = end.after(line)
    return end
