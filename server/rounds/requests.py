"""Track requests to organizations: who was asked, who may still reply, who is asked again, and who is given up.

Rounds and the delivery of the final model use the same tracker. It knows neither quorums nor deadlines: its owner decides when
an organization is settled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from cotune.protocol.messages import payload_bytes
from cotune.server.transport.base import Reply, Transport
from cotune.server.transport.node_registry import Node

MayAsk = Callable[[str, Node], bool]


@dataclass(frozen=True)
class RetryLimits:
    """How often an organization is asked.

    Attributes:
        max_losses: Number of lost requests or replies after which it is given up.
        max_requests: Most requests in total, as it may reconnect any number of times.
        backoff: Seconds before a lost request is repeated; doubled after every further loss.
    """

    max_losses: int = 3
    max_requests: int = 10
    backoff: float = 2.0


@dataclass(frozen=True)
class Requests:
    """The requests of one round or delivery.

    Attributes:
        round: The round that the requests name.
        kind: Flower's message type.
        contents: Organization -> its request, in the order of the organizations.
        max_bytes: Size of the largest reply that is accepted.
        to_whole: (organization, its request) -> the same request with the whole state; None: all hold it.
    """

    round: int
    kind: str
    contents: Mapping[str, RecordDict]
    max_bytes: int
    to_whole: Callable[[str, RecordDict], RecordDict] | None = None


@dataclass
class _Request:
    """One organization's request, which is not settled yet."""

    content: RecordDict
    sent: int = 0
    under_way: int = 0  # copies that may still be answered
    losses: int = 0
    lost: str = ""  # why the last copy was lost; "" if none was
    lost_at: float = 0.0
    asked_at: float = 0.0
    since: str = ""  # when the organization had last connected, at the time it was asked
    is_whole: bool = False  # whether it was replaced by one with the whole state
    outdated: int = 0  # copies of the request before, which may still be answered

    def reset(self) -> None:
        """Reset the counts of copies and losses, before the organization is asked for another reason."""
        self.sent = 0
        self.under_way = 0
        self.losses = 0
        self.lost = ""


class RequestTracker:
    """The requests of one round or delivery, until each is settled. No other class changes their state.

    Attributes:
        bytes_sent: Size of all requests that were sent.
        seconds_taken: Organization -> seconds until its reply, for those that have replied.
    """

    def __init__(
        self,
        transport: Transport,
        requests: Requests,
        limits: RetryLimits,
        lifetime: Callable[[str], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the tracker without sending anything.

        Args:
            transport: Carries requests and replies.
            requests: The content of a request is released when its organization is settled.
            limits: How often organizations are asked.
            lifetime: Organization -> seconds for which a request sent now stays valid.
            clock: Monotonic, in seconds, comparable with `Transport.last_seen`.
        """
        self._transport = transport
        self._round = requests.round
        self._kind = requests.kind
        self._max_bytes = requests.max_bytes
        self._to_whole = requests.to_whole
        self._limits = limits
        self._lifetime = lifetime
        self._clock = clock
        self._open = {name: _Request(content) for name, content in requests.contents.items()}
        self._last_seen = 0.0
        self.bytes_sent = 0
        self.seconds_taken: dict[str, float] = {}

    def __contains__(self, organization: object) -> bool:
        """Return whether an organization's request is not settled yet."""
        return organization in self._open

    @property
    def open(self) -> list[str]:
        """Return the organizations whose requests are not settled."""
        return list(self._open)

    @property
    def waiting(self) -> list[str]:
        """Return the organizations that were asked and may still reply."""
        return [name for name, request in self._open.items() if request.under_way]

    @property
    def idle(self) -> list[str]:
        """Return the organizations that have to be asked, for the first time or again."""
        return [name for name, request in self._open.items() if not request.under_way]

    def asked_at(self, organization: str) -> float:
        """Return when an organization was last asked, by the tracker's clock."""
        return self._open[organization].asked_at

    def connected_at(self, organization: str) -> str:
        """Return when an organization had last connected at the time it was last asked, as the SuperLink reported it."""
        return self._open[organization].since

    def loss_of(self, organization: str) -> str:
        """Return why the last request to an organization was lost; "" if none was."""
        return self._open[organization].lost

    def losses(self, organization: str) -> int:
        """Return how many requests to an organization were lost."""
        return self._open[organization].losses

    def lost_at(self, organization: str) -> float:
        """Return when the last request to an organization was lost; 0 if none was."""
        return self._open[organization].lost_at if self._open[organization].lost else 0.0

    def ask(self, may_ask: MayAsk = lambda name, node: True) -> None:
        """Send requests to all connected organizations that have to be asked.

        Args:
            may_ask: (organization, node) -> whether it may be asked now.
        """
        idle = self.idle
        connected = self._transport.connected() if idle else {}
        for name in idle:
            if name in connected and self._is_due(name) and may_ask(name, connected[name]):
                self._send(name, connected[name])

    def ask_reconnected(self) -> None:
        """Ask organizations that have reconnected again: their requests may be lost, as Flower delivers each only once."""
        seen = self._transport.last_seen()
        if seen == self._last_seen:
            return
        self._last_seen = seen
        for name, node in self._transport.connected().items():
            request = self._open.get(name)
            if request and request.under_way and node.since != request.since and request.sent < self._limits.max_requests:
                self._send(name, node)

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        """Yield replies, also to earlier rounds, but none from organizations that are settled; see `Transport.receive`."""
        for reply in self._transport.receive(seconds, last=last):
            if reply.round != self._round or reply.organization in self._open:
                yield reply

    def note_lost(self, organization: str, reason: str) -> bool:
        """Record that a copy of a request, or its reply, was lost; the organization will be asked again.

        Returns:
            Whether to give the organization up, because of too many losses or requests.
        """
        request = self._open[organization]
        request.under_way = max(0, request.under_way - 1)
        if request.under_way:
            return False  # it was asked twice and may still answer the other copy
        request.lost = reason
        request.lost_at = self._clock()
        request.losses += 1
        return request.losses >= self._limits.max_losses or request.sent >= self._limits.max_requests

    def postpone(self, organization: str) -> None:
        """Mark an organization as not asked yet, so that it is asked again later."""
        self._open[organization].reset()

    def send_whole(self, organization: str) -> bool:
        """Prepare to ask an organization again, with the whole state, as it does not hold the version that its request builds on.

        Returns:
            Whether its refusal is dealt with; False: it has refused the whole state, too.
        """
        request = self._open[organization]
        if request.is_whole and request.outdated:
            request.outdated -= 1
            return True
        if request.is_whole or self._to_whole is None:
            return False
        request.content = self._to_whole(organization, request.content)
        request.is_whole = True
        request.outdated = max(0, request.under_way - 1)
        request.reset()
        return True

    def note_reply(self, organization: str) -> None:
        """Record how long an organization took, and settle it."""
        self.seconds_taken[organization] = self._clock() - self._open[organization].asked_at
        self.settle(organization)

    def settle(self, organization: str) -> None:
        """Stop asking an organization, and release its request."""
        self._open.pop(organization, None)

    def _is_due(self, organization: str) -> bool:
        request = self._open[organization]
        if not request.lost:
            return True
        again = request.lost_at + self._limits.backoff * 2 ** (request.losses - 1)
        return self._clock() >= again and self._transport.last_seen() > request.lost_at

    def _send(self, name: str, node: Node) -> None:
        request = self._open[name]
        request.sent += 1
        request.under_way += 1
        request.since = node.since
        request.asked_at = self._clock()
        self.bytes_sent += payload_bytes(request.content)
        ttl = self._lifetime(name)
        message = Message(request.content, node.id, self._kind, ttl=ttl, group_id=str(self._round))
        self._transport.send(self._round, name, message, self._max_bytes)
