"""How much of the server one member may take: messages, bytes and disk, whatever the others do.

The server asks, and members answer: every request that is handed over to a member allows it one reply, and the bytes of both.
What goes beyond comes out of an allowance that an honest member hardly touches (a reply whose request was handed over before the
front was restarted; content that is sent again after a connection broke), and that comes back with time. So nobody can take more
than an honest member of the same plan would, and that allowance.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from cotune.server.proxy.rules import Refusal

# seconds
HOUR = 3600.0
DAY = 86400.0
_SPARE = 4  # replies
_OBJECTS = ("push-object", "pull-object")  # the calls with content worth counting: the rest is bounded by `Limits`


class Quotas(BaseModel):
    """Of one member.

    messages: announcements beyond one for each request handed over; all of them come back in an hour. reply: bytes of the largest
    reply, or request, of the plan. bytes: of content in both directions, beyond twice `reply` for each request; they come back in
    an hour. disk: bytes of objects beyond the reply to each request; they come back in a day. None: four times `reply`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    messages: int = Field(64, ge=1)
    reply: int = Field(
        9 * 2**30, ge=64 * 2**20
    )  # a node takes requests of up to 4 GiB; a reply may hold a statistic beside its change
    bytes: int | None = Field(None, ge=64 * 2**20)
    disk: int | None = Field(None, ge=64 * 2**20)

    @property
    def max_bytes(self) -> int:
        return self.bytes if self.bytes is not None else _SPARE * self.reply

    @property
    def max_disk(self) -> int:
        return self.disk if self.disk is not None else _SPARE * self.reply


class Allowance:
    """So much at a time, all of which comes back within so many seconds. clock: in seconds."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._rate = most / seconds
        self._clock = clock
        self._left = float(most)
        self._at = clock()

    def take(self, amount: int) -> bool:
        """False, and nothing is taken, where there is not so much."""
        if self.left < amount:
            return False
        self._left -= amount
        return True

    def spend(self, amount: int) -> None:
        """What has been used already; the rest is owed."""
        self._left = max(self.left - amount, -float(self._most))

    def give(self, amount: int) -> None:
        """Never beyond all of it."""
        self._left = min(self.left + amount, float(self._most))

    @property
    def left(self) -> float:
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._rate, float(self._most))
        self._at = now
        return self._left


class Usage:
    """Of all members, since the front was started: a member cannot restart it."""

    def __init__(self, quotas: Quotas, clock: Callable[[], float] = time.monotonic) -> None:
        self._quotas = quotas
        self._clock = clock
        self._members: dict[str, _Used] = {}

    def record_requests(self, member: str, requests: int) -> None:
        """A member is about to learn of so many requests."""
        used = self._of(member)
        reply = self._quotas.reply
        for _ in range(requests):
            used.messages.give(1)
            used.bytes.give(2 * reply)
            used.disk.give(min(used.stored, reply))  # the reply before was taken by the server, or nobody wants it any more
            used.stored = 0

    def announce(self, member: str) -> Refusal | None:
        """Why a member may not announce a reply now; None where it may."""
        if self._of(member).messages.take(1):
            return None
        return Refusal(
            429, f"it has announced {self._quotas.messages} replies that nobody asked for: its quota of messages is used up"
        )

    def take(self, member: str, call: str, size: int) -> Refusal | None:
        """Why a call with so many bytes of content may not pass now; None where it may."""
        if call not in _OBJECTS:
            return None
        used = self._of(member)
        if used.bytes.left < size:
            return Refusal(
                429, f"it has moved {self._quotas.max_bytes} bytes beyond what it was asked for: its quota of bytes is used up"
            )
        if call == "push-object" and not used.disk.take(size):
            return Refusal(507, f"it has left {self._quotas.max_disk} bytes beyond its replies: its quota of disk is used up")
        used.bytes.spend(size)
        used.stored += size if call == "push-object" else 0
        return None

    def answered(self, member: str, call: str, size: int) -> None:
        """So many bytes of content went to a member."""
        if call in _OBJECTS:
            self._of(member).bytes.spend(size)

    def _of(self, member: str) -> _Used:
        if member not in self._members:
            self._members[member] = _Used(self._quotas, self._clock)
        return self._members[member]


class _Used:
    """Of one member. stored: bytes of objects since a request was handed over to it."""

    def __init__(self, quotas: Quotas, clock: Callable[[], float]) -> None:
        self.messages = Allowance(quotas.messages, HOUR, clock)
        self.bytes = Allowance(quotas.max_bytes, HOUR, clock)
        self.disk = Allowance(quotas.max_disk, DAY, clock)
        self.stored = 0
