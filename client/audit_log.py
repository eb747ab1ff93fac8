"""What an organization was asked for and what it has sent, line by line, on its own disk before it leaves: site/audit.jsonl.

A request is entered as it was signed, before anything is done for it: it proves what the server has asked for.

Each line holds the SHA-256 of the line before it: a line that was changed, removed or put in shows. Lines cut off at the end do
not, unless the last hash was noted elsewhere. It may hold more than arrived: what was handed over may have been lost on its way.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from cotune.errors import RunError
from cotune.protocol.messages import payload_bytes
from cotune.storage.documents import parse_json

_START = "0" * 64  # the hash before the first line
_LONGEST_LINE = 64 * 1024  # bytes; what is read to find the last line
# characters of a value, and of one in a list: much of it a server may choose
_LONGEST_TEXT = 1000
_LONGEST_ITEM = 100
_WHOLE = ("statement", "refused")  # what was signed: cut, it would prove nothing, and none is longer than Statement.parse allows


class AuditLog:
    """Safe to use from several processes."""

    def __init__(self, site: Path) -> None:
        self.file = site / "audit.jsonl"

    @classmethod
    def at(cls, file: Path) -> AuditLog:
        """A copy of a log, wherever it is."""
        log = cls(file.parent)
        log.file = file
        return log

    def append(self, what: str, **about: Any) -> None:
        """Durable when this returns. what: request, update, refusal, receipt, blocked or keys.

        Raises RunError where it cannot be written, and for what no line has room for: much of it a server may choose.
        """
        try:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                line = self._line(descriptor, {"what": what, **about})
                if len(line) > _LONGEST_LINE:
                    raise RunError(
                        f"what would be entered in {self.file} has {len(line)} bytes: expected at most {_LONGEST_LINE};"
                        " nothing is done that is not entered there"
                    )
                _write_whole(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(
                f"{self.file} cannot be written ({error.strerror}): nothing is sent that is not entered there; make room, or mend"
                " the permissions of the site"
            ) from None

    def _line(self, descriptor: int, about: Mapping[str, Any]) -> bytes:
        """What a power cut has left of a line before stays, as a line of its own."""
        before = _last_line(descriptor)
        unfinished = b"\n" if before and not before.endswith(b"\n") else b""
        chained = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **_shortened(about), "before": _hash(before)}
        return unfinished + json.dumps(chained, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"

    def entries(self) -> list[dict[str, Any]]:
        """All lines, checked. Raises RunError for one that is not as it was written."""
        found = []
        before = b""
        for number, line in enumerate(self._lines(), start=1):
            try:
                entry = dict(parse_json(line))
            except (ValueError, TypeError):
                entry = {"what": "unfinished", "before": _hash(before)}
            if entry.get("before") != _hash(before):
                raise RunError(
                    f"{self.file} is not as it was written: line {number} does not follow from the line before; somebody or"
                    " something changed it, so compare it with a backup"
                )
            found.append(entry)
            before = line
        return found

    @property
    def head(self) -> str:
        """The hash of the last line: anyone who notes it elsewhere can see later that none was cut off."""
        lines = self._lines()
        return _hash(lines[-1] if lines else b"")

    def last(self) -> dict[str, Any]:
        """The last line, unchecked; empty where there is none."""
        try:
            with self.file.open("rb") as file:
                return dict(parse_json(_last_line(file.fileno())))
        except (OSError, ValueError, TypeError):
            return {}

    def newest_first(self) -> Iterator[dict[str, Any]]:
        """The lines from the last to the first, unchecked; what is no line of the log is left out."""
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
            raise RunError(f"{self.file} cannot be read ({error.strerror}): mend the permissions of the site") from None


def _shortened(about: Mapping[str, Any]) -> dict[str, Any]:
    """A line longer than what is read of the one before would break the chain."""

    def short(value: Any, most: int = _LONGEST_TEXT) -> Any:
        if isinstance(value, list):
            return [short(item, _LONGEST_ITEM) for item in value]
        return value[:most] if isinstance(value, str) else value

    return {name: value if name in _WHOLE else short(value) for name, value in about.items()}


def _write_whole(descriptor: int, content: bytes) -> None:
    """All of it or nothing: on a full disk a part of a line is taken back."""
    size = os.fstat(descriptor).st_size
    if os.write(descriptor, content) != len(content):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def _hash(line: bytes) -> str:
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest() if line else _START


def _last_line(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
    return tail[tail.rstrip(b"\n").rfind(b"\n") + 1 :]


def record_sizes(content: RecordDict) -> dict[str, int]:
    """Record -> bytes of its names and values, before Flower's own framing."""
    return {name: payload_bytes(RecordDict({name: record})) for name, record in content.items()}
