"""Limit how much of the server one member may use: messages, bytes and disk, independently of the others.

Every request that a member receives entitles it to one reply, and to the bytes of both. Anything beyond that is taken from an
allowance that refills over time. An honest member hardly needs it: only for a reply to a request from before a restart of the
front, or for content that is sent again after a broken connection. So no member can use more than an honest member of the same
plan would, plus the allowance.
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
_COUNTED_CALLS = ("push-object", "pull-object")  # calls whose content is counted; that of all others is small (see `Limits`)


class Quotas(BaseModel):
    """What one member may use of the server beyond what its requests need.

    Attributes:
        messages: Announcements beyond one for each request; refills in an hour.
        reply: Bytes of the plan's largest reply or request.
        bytes: Bytes of content in both directions, beyond twice `reply` for each request; refills in an hour. None: four times
            `reply`.
        disk: Bytes of objects beyond the reply to each request; refills in a day. None: four times `reply`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    messages: int = Field(64, ge=1)
    reply: int = Field(
        9 * 2**30, ge=64 * 2**20
    )  # a node accepts requests of up to 4 GiB; a reply may contain statistics beside its delta
    bytes: int | None = Field(None, ge=64 * 2**20)
    disk: int | None = Field(None, ge=64 * 2**20)

    @property
    def max_bytes(self) -> int:
        """The allowance of bytes, with its default resolved."""
        return self.bytes if self.bytes is not None else _SPARE_REPLIES * self.reply

    @property
    def max_disk(self) -> int:
        """The allowance of disk in bytes, with its default resolved."""
        return self.disk if self.disk is not None else _SPARE_REPLIES * self.reply


class Allowance:
    """An amount that is used up and refills over time (a token bucket).

    Args:
        most: The full amount.
        seconds: Time in which an empty allowance refills.
        clock: Returns the time in seconds.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._rate = most / seconds
        self._clock = clock
        self._left = float(most)
        self._at = clock()

    def take(self, amount: int) -> bool:
        """Take an amount and return True; take nothing and return False if less is left."""
        if self.left < amount:
            return False
        self._left -= amount
        return True

    def spend(self, amount: int) -> None:
        """Take an amount that was used already; the allowance may become negative, by up to the full amount."""
        self._left = max(self.left - amount, -float(self._most))

    def give(self, amount: int) -> None:
        """Give an amount back, up to the full amount."""
        self._left = min(self.left + amount, float(self._most))

    @property
    def left(self) -> float:
        """What is left now; negative if more was spent."""
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._rate, float(self._most))
        self._at = now
        return self._left


class Usage:
    """What each member has used since the proxy started; no member can make it restart.

    Args:
        quotas: Of one member.
        clock: Returns the time in seconds.
    """

    def __init__(self, quotas: Quotas, clock: Callable[[], float] = time.monotonic) -> None:
        self._quotas = quotas
        self._clock = clock
        self._members: dict[str, _MemberUsage] = {}

    def record_requests(self, member: str, requests: int) -> None:
        """Credit a member with what it needs to answer `requests` requests, before it receives them."""
        used = self._get_usage(member)
        reply = self._quotas.reply
        for _ in range(requests):
            used.messages.give(1)
            used.bytes.give(2 * reply)
            used.disk.give(min(used.stored, reply))  # the server has fetched the previous reply, or no longer needs it
            used.stored = 0

    def take_message(self, member: str) -> Refusal | None:
        """Count the announcement of a reply; return a refusal if the quota is used up, else None."""
        if self._get_usage(member).messages.take(1):
            return None
        return Refusal(
            429, f"it has announced {self._quotas.messages} replies that nobody asked for: its quota of messages is used up"
        )

    def take(self, member: str, call: str, size: int) -> Refusal | None:
        """Count the content of a call.

        Args:
            member: The caller.
            call: Name of the call.
            size: Bytes of its content.

        Returns:
            A refusal if a quota is used up; else None.
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
        """Count content that was sent to a member.

        Args:
            member: The caller.
            call: Name of the call.
            size: Bytes of the answer's content.
        """
        if call in _COUNTED_CALLS:
            self._get_usage(member).bytes.spend(size)

    def _get_usage(self, member: str) -> _MemberUsage:
        if member not in self._members:
            self._members[member] = _MemberUsage(self._quotas, self._clock)
        return self._members[member]


class _MemberUsage:
    """The allowances of one member, and the bytes of objects that it has stored since its last request."""

    def __init__(self, quotas: Quotas, clock: Callable[[], float]) -> None:
        self.messages = Allowance(quotas.messages, HOUR, clock)
        self.bytes = Allowance(quotas.max_bytes, HOUR, clock)
        self.disk = Allowance(quotas.max_disk, DAY, clock)
        self.stored = 0
