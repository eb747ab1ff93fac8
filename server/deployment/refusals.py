"""Whose announcements the front has refused, how often and why: superlink/refused.json, for the run, the status and people."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cotune.errors import RunError
from cotune.reporting.documents.events import MessagesRefused
from cotune.server.runs.events import Events, read_events
from cotune.storage.documents import JsonDocument

_EVERY_SECONDS = 1.0  # the file is not written more often
_MOST_ADDRESSES = 100  # of strangers: anyone who has been refused least makes room
_LOOKS_AT = ("run_started", "update_dropped", "round_finished", "delivery_started")


class Refused(BaseModel):
    """Of one member or address, since the file was begun. reason: of the last one, in the front's words."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: int
    reason: str
    at: str


class _Document(BaseModel):
    """addresses: of those that had not shown that they are members; of IPv6 the network /64."""

    members: dict[str, Refused] = {}
    addresses: dict[str, Refused] = {}


class _Before(BaseModel):
    counts: dict[str, int]


class RefusalLog:
    """Goes on with what the file holds."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        document = _read(file)
        self._members = dict(document.members)
        self._addresses = dict(document.addresses)
        self._later: threading.Timer | None = None  # writes what has come since the file was written

    def note(self, member: str, reason: str) -> None:
        """A full disk keeps nobody from being refused. The first of a member is written at once, what follows soon after."""
        with self._lock:
            self._keep(not _count(self._members, member, reason))

    def note_address(self, address: str, reason: str) -> None:
        """Of a stranger, whom it costs nothing to come from many addresses: so many of them are kept, and written soon after."""
        with self._lock:
            if address not in self._addresses and len(self._addresses) >= _MOST_ADDRESSES:
                del self._addresses[min(self._addresses, key=lambda known: self._addresses[known].count)]
            _count(self._addresses, address, reason)
            self._keep(now=False)

    def _keep(self, now: bool) -> None:
        if now:
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
            JsonDocument(self._file, _Document).write(_Document(members=self._members, addresses=self._addresses))


def _count(found: dict[str, Refused], who: str, reason: str) -> int:
    """One more. Returns how many there were."""
    before = found[who].count if who in found else 0
    found[who] = Refused(count=before + 1, reason=reason, at=datetime.now(UTC).isoformat(timespec="seconds"))
    return before


def read_refusals(file: Path) -> Mapping[str, Refused]:
    """Of the members. Nothing where there is no such file, or it is damaged: it is news and no record."""
    return _read(file).members


def read_strangers(file: Path) -> Mapping[str, Refused]:
    """By address, of those that had not shown that they are members when they were refused."""
    return _read(file).addresses


def _read(file: Path) -> _Document:
    try:
        return JsonDocument(file, _Document).read() or _Document()
    except RunError:
        return _Document()


class RefusalWatch:
    """A listener to the events of a run: whenever it begins or goes on, somebody is dropped, or a round is over, it tells of what
    the front has refused meanwhile, so that the sender is named in the run whose messages it was after.

    What it has told is in the events themselves, each with the total, and what had been refused before the run in a file beside
    them: a process that is killed in between loses no refusal, and the next one tells none twice.
    """

    def __init__(self, file: Path, events: Events) -> None:
        self._file = file
        self._report = events.write
        self._seen = _before(file, events.path.with_name("refused-before.json")) | _told(events.path)

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event not in _LOOKS_AT:
            return
        for member, refused in read_refusals(self._file).items():
            seen = self._seen.get(member, 0)
            more = refused.count - (seen if seen <= refused.count else 0)  # fewer: the file was begun anew
            if more > 0:
                self._seen[member] = refused.count
                self._report(MessagesRefused(organization=member, count=more, total=refused.count, reason=refused.reason))


def _before(file: Path, kept: Path) -> dict[str, int]:
    """Member -> what had been refused when the run began, as it was counted then."""
    document = JsonDocument(kept, _Before)
    with suppress(RunError):
        if found := document.read():
            return found.counts
    counts = {member: refused.count for member, refused in read_refusals(file).items()}
    with suppress(OSError):  # the run itself says that the disk is full
        document.write(_Before(counts=counts))
    return counts


def _told(events: Path) -> dict[str, int]:
    """Member -> the total that was told last."""
    found = read_events(events) if events.exists() else []
    return {
        str(event["organization"]): int(event["total"])
        for event in found
        if event["event"] == "messages_refused" and "total" in event
    }
