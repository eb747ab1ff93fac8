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
from cotune.storage.json_documents import JsonDocument

_MAX_ADDRESSES = 100  # of strangers: anyone who has been refused least makes room
_REPORTING_EVENTS = ("run_started", "update_dropped", "round_finished", "delivery_started")


class Refused(BaseModel):
    """Refusals of one member or address, since the file was begun.

    Attributes:
        count: The number of refusals.
        reason: Of the last one, in the front's words.
        at: When that was (UTC).
    """

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
    """Goes on with what the file holds.

    Args:
        file: superlink/refused.json.
        write_interval: Seconds in which the file is not written again.
    """

    def __init__(self, file: Path, write_interval: float = 1.0) -> None:
        self._file = file
        self._write_interval = write_interval
        self._lock = threading.Lock()
        document = _read(file)
        self._members = dict(document.members)
        self._addresses = dict(document.addresses)
        self._timer: threading.Timer | None = None  # writes what has come since the file was written

    def record_member(self, member: str, reason: str) -> None:
        """Count a refusal of a member. The first is written at once, what follows soon after; a full disk is ignored."""
        with self._lock:
            self._schedule_write(not _increment(self._members, member, reason))

    def record_address(self, address: str, reason: str) -> None:
        """Count a refusal of a stranger. Only the most frequent addresses are kept: it costs nothing to come from many."""
        with self._lock:
            if address not in self._addresses and len(self._addresses) >= _MAX_ADDRESSES:
                del self._addresses[min(self._addresses, key=lambda known: self._addresses[known].count)]
            _increment(self._addresses, address, reason)
            self._schedule_write(now=False)

    def _schedule_write(self, now: bool) -> None:
        if now:
            self._write()
        elif self._timer is None:
            self._timer = threading.Timer(self._write_interval, self._write_later)
            self._timer.daemon = True
            self._timer.start()

    def _write_later(self) -> None:
        with self._lock:
            self._timer = None
            self._write()

    def _write(self) -> None:
        with suppress(OSError):
            JsonDocument(self._file, _Document).write(_Document(members=self._members, addresses=self._addresses))


def _increment(found: dict[str, Refused], who: str, reason: str) -> int:
    """One more. Returns how many there were."""
    before = found[who].count if who in found else 0
    found[who] = Refused(count=before + 1, reason=reason, at=datetime.now(UTC).isoformat(timespec="seconds"))
    return before


def read_refusals(file: Path) -> Mapping[str, Refused]:
    """Return the refusals of members, by name; none where the file is missing or damaged: it is no record to rely on."""
    return _read(file).members


def read_strangers(file: Path) -> Mapping[str, Refused]:
    """Return the refusals of senders that had not shown that they are members, by address."""
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
        self._seen = _read_earlier_counts(file, events.path.with_name("refused-before.json")) | _read_reported(events.path)

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event not in _REPORTING_EVENTS:
            return
        for member, refused in read_refusals(self._file).items():
            seen = self._seen.get(member, 0)
            more = refused.count - (seen if seen <= refused.count else 0)  # fewer: the file was restarted
            if more > 0:
                self._seen[member] = refused.count
                self._report(MessagesRefused(organization=member, count=more, total=refused.count, reason=refused.reason))


def _read_earlier_counts(file: Path, kept: Path) -> dict[str, int]:
    """Member -> what had been refused when the run began, as it was counted then."""
    document = JsonDocument(kept, _Before)
    with suppress(RunError):
        if found := document.read():
            return found.counts
    counts = {member: refused.count for member, refused in read_refusals(file).items()}
    with suppress(OSError):  # the run itself says that the disk is full
        document.write(_Before(counts=counts))
    return counts


def _read_reported(events: Path) -> dict[str, int]:
    """Member -> the total that was told last."""
    found = read_events(events) if events.exists() else []
    return {
        str(event["organization"]): int(event["total"])
        for event in found
        if event["event"] == "messages_refused" and "total" in event
    }
