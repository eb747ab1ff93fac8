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

from cotune.server.proxy.allowed_calls import Refusal

# seconds
HOUR = 3600.0
DAY = 86400.0
_SPARE_REPLIES = 4  # replies
_COUNTED_CALLS = ("push-object", "pull-object")  # the calls with content worth counting: the rest is bounded by `Limits`


class Quotas(BaseModel):
    """What one member may take of the server, beyond what its requests need.

    Attributes:
        messages: Announcements beyond one for each request; they come back in an hour.
        reply: Bytes of the largest reply, or request, of the plan.
        bytes: Bytes of content in both directions, beyond twice `reply` for each request; they come back in an hour. None: four
            times `reply`.
        disk: Bytes of objects beyond the reply to each request; they come back in a day. None: four times `reply`.
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
        return self.bytes if self.bytes is not None else _SPARE_REPLIES * self.reply

    @property
    def max_disk(self) -> int:
        return self.disk if self.disk is not None else _SPARE_REPLIES * self.reply


class Allowance:
    """An amount that is used up and comes back with time (a token bucket).

    Args:
        most: The whole amount.
        seconds: In which all of it comes back.
        clock: The time in seconds.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._rate = most / seconds
        self._clock = clock
        self._left = float(most)
        self._at = clock()

    def take(self, amount: int) -> bool:
        """Take an amount, and return True; where there is not so much, take nothing and return False."""
        if self.left < amount:
            return False
        self._left -= amount
        return True

    def spend(self, amount: int) -> None:
        """Take an amount that has been used already; what is missing is owed."""
        self._left = max(self.left - amount, -float(self._most))

    def give(self, amount: int) -> None:
        """Give an amount back, never beyond the whole amount."""
        self._left = min(self.left + amount, float(self._most))

    @property
    def left(self) -> float:
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._rate, float(self._most))
        self._at = now
        return self._left


class Usage:
    """What all members have taken since the proxy was started; no member can restart it.

    Args:
        quotas: Of one member.
        clock: The time in seconds.
    """

    def __init__(self, quotas: Quotas, clock: Callable[[], float] = time.monotonic) -> None:
        self._quotas = quotas
        self._clock = clock
        self._members: dict[str, _MemberUsage] = {}

    def record_requests(self, member: str, requests: int) -> None:
        """Give a member what it needs for so many requests, which it is about to learn of."""
        used = self._get_usage(member)
        reply = self._quotas.reply
        for _ in range(requests):
            used.messages.give(1)
            used.bytes.give(2 * reply)
            used.disk.give(min(used.stored, reply))  # the reply before was taken by the server, or nobody wants it any more
            used.stored = 0

    def take_message(self, member: str) -> Refusal | None:
        """Take one announcement; return the refusal where the member may not announce a reply now."""
        if self._get_usage(member).messages.take(1):
            return None
        return Refusal(
            429, f"it has announced {self._quotas.messages} replies that nobody asked for: its quota of messages is used up"
        )

    def take(self, member: str, call: str, size: int) -> Refusal | None:
        """Take the content of a call; return the refusal where it may not pass now.

        Args:
            member: The caller.
            call: Its name.
            size: Bytes of its content.
        """
        if call not in _COUNTED_CALLS:
            return None
        used = self._get_usage(member)
        if used.bytes.left < size:
            return Refusal(
                429, f"it has moved {self._quotas.max_bytes} bytes beyond what it was asked for: its quota of bytes is used up"
            )
        if call == "push-object" and not used.disk.take(size):
            return Refusal(507, f"it has left {self._quotas.max_disk} bytes beyond its replies: its quota of disk is used up")
        used.bytes.spend(size)
        used.stored += size if call == "push-object" else 0
        return None

    def record_response(self, member: str, call: str, size: int) -> None:
        """Count bytes of content that went to a member."""
        if call in _COUNTED_CALLS:
            self._get_usage(member).bytes.spend(size)

    def _get_usage(self, member: str) -> _MemberUsage:
        if member not in self._members:
            self._members[member] = _MemberUsage(self._quotas, self._clock)
        return self._members[member]


class _MemberUsage:
    """The allowances of one member. stored: bytes of objects since its last request."""

    def __init__(self, quotas: Quotas, clock: Callable[[], float]) -> None:
        self.messages = Allowance(quotas.messages, HOUR, clock)
        self.bytes = Allowance(quotas.max_bytes, HOUR, clock)
        self.disk = Allowance(quotas.max_disk, DAY, clock)
        self.stored = 0
