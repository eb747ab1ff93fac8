"""Append-only logs whose entries are chained by hashes, so that a change to what was written shows.

Each entry is bound to the hash of the one before, from `START_HASH` on: an entry that was changed, removed or inserted breaks the
chain (`verify_chain`). A log is kept in one of two ways:

- `LineLog`: a file with one JSON object per line, which people read and copy. Entries cut off at its end do not show, unless the
  last hash was noted elsewhere.
- `storage.database_log.DatabaseLog`: SQLite, where an entry and other tables change in one transaction.

Anyone who can write all files of a log can forge it; an exported head hash, kept elsewhere, shows that too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cotune.errors import RunError
from cotune.storage.files import exclusive_lock
from cotune.storage.json_documents import parse_json

START_HASH = "0" * 64  # the hash before the first entry
T = TypeVar("T")


class BrokenChain(ValueError):
    """An entry does not follow from the one before.

    Attributes:
        number: Of the first such entry, from 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"entry {number} does not follow from the one before")
        self.number = number


def verify_chain(entries: Iterable[T], follow: Callable[[str, T], str | None]) -> str:
    """Check that each entry follows from the one before, and return the hash of the last.

    Args:
        entries: In order.
        follow: (hash before, entry) -> the entry's own hash; None where it does not follow.

    Raises:
        BrokenChain: At the first entry that does not follow.
    """
    head = START_HASH
    for number, entry in enumerate(entries, start=1):
        following = follow(head, entry)
        if following is None:
            raise BrokenChain(number)
        head = following
    return head


_MAX_LINE_BYTES = 64 * 1024  # what is read to find the last line


class LineLog:
    """A log in a file of JSON lines, safe to use from several processes.

    Each line is an object with `at` (UTC, ISO 8601), what was appended, and `before`: the SHA-256 of the line before it.

    Args:
        file: The log, which is created (mode 0600) with its first entry.
        consequence: What does not happen without an entry, for the errors: "nothing is sent that is not entered there".
    """

    def __init__(self, file: Path, consequence: str) -> None:
        self.file = file
        self._consequence = consequence

    def append(self, what: str, **fields: Any) -> None:
        """Append an entry; when this returns, it survives a power cut.

        What a power cut has left of the line before stays, as a line of its own.

        Args:
            what: The kind of entry.
            fields: Plain values.

        Raises:
            RunError: The file cannot be written (`run.not_writable`), or the entry has more than 64 KiB (`run.entry_too_long`).
        """
        with exclusive_lock(self.file.with_name(f".{self.file.name}.lock")):
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                try:
                    _write_whole(descriptor, self._line(descriptor, {"what": what, **fields}))
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise RunError(
                    f"{self.file} cannot be written ({error.strerror}): {self._consequence}; free space, or correct its"
                    " permissions",
                    code="run.not_writable",
                ) from None

    def _line(self, descriptor: int, entry: Mapping[str, Any]) -> bytes:
        before = _last_line(descriptor)
        unfinished = b"\n" if before and not before.endswith(b"\n") else b""
        chained = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **entry, "before": _line_hash(before)}
        line = unfinished + json.dumps(chained, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        if len(line) > _MAX_LINE_BYTES:  # the next entry would not find its beginning
            raise RunError(
                f"an entry for {self.file} has {len(line)} bytes: expected at most {_MAX_LINE_BYTES}; {self._consequence}",
                code="run.entry_too_long",
            )
        return line

    def entries(self) -> list[dict[str, Any]]:
        """Return all entries, verified; one that a power cut has torn as `{"what": "unfinished", "before": …}`.

        Raises:
            RunError: A line is not as it was written (`run.changed_log`), or the file cannot be read (`run.not_readable`).
        """
        lines = self._lines()
        try:
            verify_chain(lines, lambda before, line: _line_hash(line) if _entry(before, line).get("before") == before else None)
        except BrokenChain as broken:
            raise RunError(
                f"{self.file} is not as it was written: line {broken.number} does not follow from the line before; somebody or"
                " something changed it, so compare it with a backup",
                code="run.changed_log",
            ) from None
        return [_entry(before, line) for before, line in zip([START_HASH, *map(_line_hash, lines)], lines, strict=False)]

    @property
    def head(self) -> str:
        """The hash of the last line: who notes it elsewhere can see later that none was cut off."""
        lines = self._lines()
        return _line_hash(lines[-1] if lines else b"")

    def last(self) -> dict[str, Any]:
        """Return the last entry, unverified; empty where there is none."""
        try:
            with self.file.open("rb") as file:
                return dict(parse_json(_last_line(file.fileno())))
        except (OSError, ValueError, TypeError):
            return {}

    def newest_first(self) -> Iterator[dict[str, Any]]:
        """Iterate over the entries from the last to the first, unverified, without lines that are no entries."""
        for line in reversed(self._lines()):
            try:
                entry = parse_json(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry

    def _lines(self) -> list[bytes]:
        try:
            return self.file.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(
                f"{self.file} cannot be read ({error.strerror}): correct its permissions", code="run.not_readable"
            ) from None


def _entry(before: str, line: bytes) -> dict[str, Any]:
    """A line's entry; for one that was torn, what stands for it."""
    try:
        entry = parse_json(line)
    except ValueError:
        entry = None
    return entry if isinstance(entry, dict) else {"what": "unfinished", "before": before}


def _write_whole(descriptor: int, content: bytes) -> None:
    """Write all of it or nothing: on a full disk a part of a line is taken back."""
    size = os.fstat(descriptor).st_size
    if os.write(descriptor, content) != len(content):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def _line_hash(line: bytes) -> str:
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest() if line else START_HASH


def _last_line(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, _MAX_LINE_BYTES, max(0, size - _MAX_LINE_BYTES))
    return tail[tail.rstrip(b"\n").rfind(b"\n") + 1 :]
