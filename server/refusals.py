"""Whose announcements the front has refused, how often and why: superlink/refused.json, for the run, the status and people."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cotune.models.durable import write_durably

__all__ = ["Refusals", "Refused", "Watch", "read_refusals"]

_EVERY_SECONDS = 1.0  # the file is not written more often


class Refused(BaseModel):
    """Of one member, since the file was begun. reason: of the last one, in the front's words."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: int
    reason: str
    at: str


class _Document(BaseModel):
    members: dict[str, Refused] = {}


class Refusals:
    """Goes on with what the file holds."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._members = dict(read_refusals(file))
        self._later: threading.Timer | None = None  # writes what has come since the file was written

    def note(self, member: str, reason: str) -> None:
        """A full disk keeps nobody from being refused. The first of a member is written at once, what follows soon after."""
        with self._lock:
            before = self._members[member].count if member in self._members else 0
            self._members[member] = Refused(count=before + 1, reason=reason, at=datetime.now(UTC).isoformat(timespec="seconds"))
            if not before:
                self._write()
            elif self._later is None:
                self._later = threading.Timer(_EVERY_SECONDS, self._catch_up)
                self._later.daemon = True
                self._later.start()

    def _catch_up(self) -> None:
        with self._lock:
            self._later = None
            self._write()

    def _write(self) -> None:
        with suppress(OSError):
            write_durably(self._file, _Document(members=self._members).model_dump_json().encode())


def read_refusals(file: Path) -> Mapping[str, Refused]:
    """Nothing where there is no such file, or it is damaged: it is news and no record."""
    try:
        return _Document.model_validate_json(file.read_bytes()).members
    except (OSError, ValueError):
        return {}


class Watch:
    """A listener to the events of a run: whenever somebody is dropped, or a round is over, it tells of what the front has refused
    meanwhile, so that the sender is named in the run whose messages it was after. tell: as of `Events`.
    """

    def __init__(self, file: Path, tell: Callable[..., None]) -> None:
        self._file, self._tell = file, tell
        self._seen = {member: refused.count for member, refused in read_refusals(file).items()}

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event not in ("update_dropped", "round_finished"):
            return
        for member, refused in read_refusals(self._file).items():
            seen = self._seen.get(member, 0)
            more = refused.count - (seen if seen <= refused.count else 0)  # fewer: the file was begun anew
            if more > 0:
                self._seen[member] = refused.count
                self._tell("messages_refused", organisation=member, count=more, reason=refused.reason)
