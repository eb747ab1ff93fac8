"""A Flower Grid whose nodes are on this machine: the messages that were pushed, and who they are for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN = 1
_SERVER_NODE = 1


class LocalGrid(Grid):
    """A grid of simulated nodes, numbered from 2. How messages are answered is for subclasses to say, in `pull_messages`.

    Args:
        nodes: Their number.
    """

    def __init__(self, nodes: int = 1) -> None:
        self.nodes = range(_SERVER_NODE + 1, _SERVER_NODE + 1 + nodes)
        self._pending: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        self._run = Run.create_empty(RUN)
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = RUN
        TaskIdentity.node_id = _SERVER_NODE

    def set_run(self, run: Run) -> None:
        """Set the run that `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that was set."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message to a node; for the arguments see Flower's `Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of all nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages until their replies are pulled, and return their ids."""
        ids = []
        for message in messages:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number  # as Flower's own grids do
            self._pending[number] = message
            ids.append(number)
        return ids

    def discard(self, message_ids: Iterable[str]) -> None:
        """Let go of messages whose replies nobody will pull."""
        for number in message_ids:
            self._pending.pop(number, None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages, and return all replies; there is no timeout."""
        return list(self.pull_messages(self.push_messages(messages)))
