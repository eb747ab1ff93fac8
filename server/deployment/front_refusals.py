"""Count the front's refusals by sender, with reasons: superlink/refused.json, for the events of runs and for the status."""

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

_MAX_ADDRESSES = 100  # of strangers; the one with the fewest refusals is dropped
_REPORTING_EVENTS = ("run_started", "update_dropped", "round_finished", "delivery_started")


class Refused(BaseModel):
    """Refusals of one member or address, since the file was created.

    Attributes:
        count: Number of refusals.
        reason: The front's reason for the last one.
        at: When that was (UTC).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: int
    reason: str
    at: str


class _Document(BaseModel):
    """The document: refusals of members by name, and of strangers by address (for IPv6, the network /64)."""

    members: dict[str, Refused] = {}
    addresses: dict[str, Refused] = {}


class _Before(BaseModel):
    counts: dict[str, int]


class RefusalLog:
    """Counts refusals, continuing with the counts in the file.

    Args:
        file: superlink/refused.json.
        write_interval: Minimum of seconds between two writes of the file.
    """

    def __init__(self, file: Path, write_interval: float = 1.0) -> None:
        self._file = file
        self._write_interval = write_interval
        self._lock = threading.Lock()
        document = _read(file)
        self._members = dict(document.members)
        self._addresses = dict(document.addresses)
        self._timer: threading.Timer | None = None  # writes the refusals since the last write

    def record_member(self, member: str, reason: str) -> None:
        """Count a refusal of a member. The first is written at once, further ones soon after; a full disk is ignored."""
        with self._lock:
            self._schedule_write(not _increment(self._members, member, reason))

    def record_address(self, address: str, reason: str) -> None:
        """Count a refusal of a stranger. Only the most frequent addresses are kept, as an attacker can use many."""
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
    """Add one refusal, and return the previous count."""
    before = found[who].count if who in found else 0
    found[who] = Refused(count=before + 1, reason=reason, at=datetime.now(UTC).isoformat(timespec="seconds"))
    return before


def read_refusals(file: Path) -> Mapping[str, Refused]:
    """Return the refusals of members by name; none if the file is missing or damaged, as it is only informative."""
    return _read(file).members


def read_strangers(file: Path) -> Mapping[str, Refused]:
    """Return the refusals of strangers, which did not authenticate as members, by address."""
    return _read(file).addresses


def _read(file: Path) -> _Document:
    try:
        return JsonDocument(file, _Document).read() or _Document()
    except RunError:
        return _Document()


class RefusalWatch:
    """An observer of a run's events that adds events about the front's refusals.

    Whenever the run starts or continues, an organization is dropped, or a round ends, it reports what the front has refused
    since, so that the run's history names the senders. Each of its events contains the total, and the counts before the run are
    in a file beside the events: a process that is killed in between loses no refusal, and the next one reports none twice.
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
            more = refused.count - (seen if seen <= refused.count else 0)  # a smaller count: the file was recreated
            if more > 0:
                self._seen[member] = refused.count
                self._report(MessagesRefused(organization=member, count=more, total=refused.count, reason=refused.reason))


def _read_earlier_counts(file: Path, kept: Path) -> dict[str, int]:
    """Return member -> number of refusals before the run started."""
    document = JsonDocument(kept, _Before)
    with suppress(RunError):
        if found := document.read():
            return found.counts
    counts = {member: refused.count for member, refused in read_refusals(file).items()}
    with suppress(OSError):  # the run itself reports a full disk
        document.write(_Before(counts=counts))
    return counts


def _read_reported(events: Path) -> dict[str, int]:
    """Return member -> the total in its last event."""
    found = read_events(events) if events.exists() else []
    return {
        str(event["organization"]): int(event["total"])
        for event in found
        if event["event"] == "messages_refused" and "total" in event
    }
