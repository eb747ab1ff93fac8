"""Requests to organizations and their replies.

In a simulation the calls are made at once, one organization after the other; in a real run threads carry them (superlink.py).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from cotune.flower.chunks import pull_reply
from cotune.server.outcomes import Lost, Rejected
from cotune.server.transport.node_registry import Node, NodeRegistry

_POLL_SECONDS = 0.02


@dataclass
class Reply:
    """What came of one request.

    Attributes:
        round: The round of the request.
        organization: Who was asked.
        content: The message; `Lost` where none will come, so that the organization may be asked again; `Rejected` where what it
            has sent was not taken; None once it was taken out.
    """

    round: int
    organization: str
    content: Message | Lost | Rejected | None

    @property
    def message(self) -> Message | None:
        """The message, where it is one that was not taken out."""
        return self.content if isinstance(self.content, Message) else None

    def take(self) -> Message | Lost | Rejected:
        """Take the content out: a message is large, and has one owner at a time."""
        content = self.content
        self.content = None
        assert content is not None, "a reply is read once"
        return content


class Transport(Protocol):
    """Carries requests to organizations, and their replies back."""

    def connected(self) -> Mapping[str, Node]:
        """Return organization -> node of those that were connected at the last look."""
        ...

    def last_seen(self) -> float:
        """Return when the last look was (monotonic; 0: there was none); constant where nobody comes and goes."""
        ...

    def left(self) -> Collection[str]:
        """Return those that had left of their own accord at the last look."""
        ...

    def revoked(self) -> Collection[str]:
        """Return those whose invitation was revoked, at the last look."""
        ...

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        """Send a request, or begin to. It may be sent once more where it may be lost: the first reply counts.

        Args:
            round: The round that it belongs to.
            organization: Whom it is for.
            message: The request, addressed to the organization's node.
            max_bytes: Size of the largest reply that is taken.
        """
        ...

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        """Yield what has come by now, else what comes first.

        Args:
            seconds: How long to wait where nothing has come.
            last: Whether nobody is waited for after this.
        """
        ...

    def forget(self, round: int) -> None:
        """Drop replies to this round and those before it from now on."""
        ...

    def close(self) -> None:
        """End what works in the background."""
        ...


class InProcessTransport:
    """Makes all calls in this thread: the first organization's reply, then the second's; one is in memory at a time."""

    def __init__(self, grid: Grid, nodes: NodeRegistry) -> None:
        """Create the transport of a simulation over its grid and nodes."""
        self._grid = grid
        self._nodes = nodes
        self._round = 0
        self._waiting: dict[str, str] = {}  # organization -> id of its message
        self._earlier: dict[tuple[int, str], str] = {}  # the same of rounds before

    def connected(self) -> Mapping[str, Node]:
        return self._nodes.connected()

    def last_seen(self) -> float:
        return 1.0

    def left(self) -> Collection[str]:
        return ()

    def revoked(self) -> Collection[str]:
        return ()

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        if round != self._round:
            self._earlier |= {(self._round, name): number for name, number in self._waiting.items()}
            self._round = round
            self._waiting = {}
        for number in self._grid.push_messages([message]):
            self._waiting[organization] = number

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        for (round, name), number in list(self._earlier.items()):
            reply = Reply(round, name, pull_reply(self._grid, number))
            if reply.content is not None:
                del self._earlier[round, name]
                yield reply
                return
        for name in list(self._waiting) if last else list(itertools.islice(self._waiting, 1)):
            reply = Reply(self._round, name, pull_reply(self._grid, self._waiting[name]))
            if reply.content is not None:
                del self._waiting[name]
                yield reply
                if not last:
                    return
        if not last:
            time.sleep(min(seconds, _POLL_SECONDS))

    def forget(self, round: int) -> None:
        self._earlier = {key: number for key, number in self._earlier.items() if key[0] > round}
        if self._round <= round:
            self._waiting = {}

    def close(self) -> None:
        """There is nothing to end."""
