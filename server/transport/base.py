"""The interface of transports, which carry requests to organizations and their replies back, and the one of simulations.

In a simulation, calls are made in process, one organization after the other; a real run uses threads (superlink.py).
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
from cotune.flower.local_grid import LocalGrid
from cotune.server.request_outcomes import Lost, Rejected
from cotune.server.transport.node_registry import Node, NodeRegistry

_POLL_SECONDS = 0.02


@dataclass
class Reply:
    """The result of one request.

    Attributes:
        round: The round of the request.
        organization: The recipient of the request.
        content: The message; `Lost` if none will arrive, so that the organization may be asked again; `Rejected` if what it sent
            was not accepted; None after `take`.
    """

    round: int
    organization: str
    content: Message | Lost | Rejected | None

    @property
    def message(self) -> Message | None:
        """The content if it is a message and was not taken, else None."""
        return self.content if isinstance(self.content, Message) else None

    def take(self) -> Message | Lost | Rejected:
        """Return the content and drop the reference to it: a message is large, and has one owner at a time."""
        content = self.content
        self.content = None
        assert content is not None, "a reply is read once"
        return content


class Transport(Protocol):
    """Carries requests to organizations, and their replies back.

    It checks at intervals which organizations are connected; the methods below report the state at the last check.
    """

    def connected(self) -> Mapping[str, Node]:
        """Return organization -> node of those that were connected at the last check."""
        ...

    def last_seen(self) -> float:
        """Return the time of the last check (monotonic clock; 0: none yet); constant if connections cannot change."""
        ...

    def left(self) -> Collection[str]:
        """Return the organizations that had left voluntarily at the last check."""
        ...

    def revoked(self) -> Collection[str]:
        """Return the organizations whose invitation was revoked at the last check."""
        ...

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        """Start to send a request. If it may be lost, it can be sent again; the first reply counts.

        Args:
            round: The round that it belongs to.
            organization: The recipient.
            message: The request, addressed to the organization's node.
            max_bytes: Size of the largest reply that is accepted.
        """
        ...

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        """Yield the replies that have arrived, or the next one.

        Args:
            seconds: How long to wait if none has arrived.
            last: Whether this is the last call of the round, so that it must not wait.
        """
        ...

    def forget(self, round: int) -> None:
        """Drop all further replies to this round and earlier ones."""
        ...

    def close(self) -> None:
        """Stop all threads in the background."""
        ...


class InProcessTransport:
    """Makes all calls in this thread, one organization after the other, so that one reply is in memory at a time."""

    def __init__(self, grid: Grid, nodes: NodeRegistry) -> None:
        """Create the transport of a simulation over its grid and nodes."""
        self._grid = grid
        self._nodes = nodes
        self._round = 0
        self._waiting: dict[str, str] = {}  # organization -> id of its message
        self._earlier: dict[tuple[int, str], str] = {}  # (round, organization) -> id of its message, of earlier rounds

    def connected(self) -> Mapping[str, Node]:
        """Return organization -> node."""
        return self._nodes.connected()

    def last_seen(self) -> float:
        """Return a constant, as simulated connections do not change."""
        return 1.0

    def left(self) -> Collection[str]:
        """Return nothing: simulated organizations do not leave."""
        return ()

    def revoked(self) -> Collection[str]:
        """Return nothing: a simulation has no invitations."""
        return ()

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        """Hand a request to the grid; see `Transport.send`."""
        if round != self._round:
            self._earlier |= {(self._round, name): number for name, number in self._waiting.items()}
            self._round = round
            self._waiting = {}
        for number in self._grid.push_messages([message]):
            self._waiting[organization] = number

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        """Yield the next reply, late ones first, or all of them if `last`; see `Transport.receive`."""
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
        """Drop all further replies to this round and earlier ones."""
        dropped = [number for key, number in self._earlier.items() if key[0] <= round]
        self._earlier = {key: number for key, number in self._earlier.items() if key[0] > round}
        if self._round <= round:
            dropped += self._waiting.values()
            self._waiting = {}
        if isinstance(self._grid, LocalGrid):
            self._grid.discard(dropped)

    def close(self) -> None:
        """Do nothing, as there are no threads."""
