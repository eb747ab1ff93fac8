"""Messages to organizations and their answers. In a simulation the calls are made at once, one organization after the other;
a real run's post is carried by threads (superlink.py).
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
from cotune.server.transport.node_registry import Node, NodeRegistry

_POLL_SECONDS = 0.02


@dataclass
class Reply:
    """What came of one request. reply: None where none will come; then `lost` says why, and it may be asked again, or `refused`
    why the answer was not taken. Anyone who has read a reply takes it out, so that it is not held any longer.
    """

    round: int
    organization: str
    reply: Message | None
    lost: str = ""
    refused: str = ""

    @property
    def answers(self) -> bool:
        return self.reply is not None or bool(self.refused)


class Transport(Protocol):
    def connected(self) -> Mapping[str, Node]:
        """Organization -> node of those that were connected at the last look."""
        ...

    def looked(self) -> float:
        """When that was (monotonic), above 0; always the same where nobody comes and goes."""
        ...

    def left(self) -> Collection[str]:
        """Those that had left of their own accord at the last look."""
        ...

    def revoked(self) -> Collection[str]:
        """Those whose invitation was revoked, at the last look."""
        ...

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        """Hands a request over, or begins to; once more where the first may be lost: whichever is answered first counts.
        max_bytes: of its answer; a larger one is not taken.
        """
        ...

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        """What has come by now, else within so many seconds. last: nobody is waited for after this."""
        ...

    def forget(self, round: int) -> None:
        """Nobody waits for answers of this round and those before it any more."""
        ...

    def close(self) -> None: ...


class InProcessTransport:
    """In this thread: the first organization's answer, then the second's; one answer is held at a time."""

    def __init__(self, grid: Grid, addresses: NodeRegistry) -> None:
        self._grid = grid
        self._addresses = addresses
        self._round = 0
        self._waiting: dict[str, str] = {}  # organization -> id of its message
        self._earlier: dict[tuple[int, str], str] = {}  # the same of rounds before

    def connected(self) -> Mapping[str, Node]:
        return self._addresses.connected()

    def looked(self) -> float:
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
            letter = Reply(round, name, pull_reply(self._grid, number))
            if letter.reply is not None:
                del self._earlier[round, name]
                yield letter
                return
        for name in list(self._waiting) if last else list(itertools.islice(self._waiting, 1)):
            letter = Reply(self._round, name, pull_reply(self._grid, self._waiting[name]))
            if letter.reply is not None:
                del self._waiting[name]
                yield letter
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
