"""The in-process engine: a Flower Grid whose nodes are calls of a ClientApp in this process. No Ray, no ports, one base model.

A message is answered when its reply is pulled, so that one organization trains at a time and one reply is in memory at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_SERVER_NODE = 1
_RUN = 1


class InProcessGrid(Grid):
    """A grid of simulated nodes, numbered from 2, that all run one ClientApp.

    Args:
        client_app: The app.
        nodes: Their number.
    """

    def __init__(self, client_app: ClientApp, nodes: int = 1) -> None:
        self._app = client_app
        self._contexts = {
            node: Context(
                run_id=_RUN,
                node_id=node,
                node_config=UserConfig({"partition-id": i, "num-partitions": nodes}),
                state=RecordDict(),
                run_config=UserConfig(),
            )
            for i, node in enumerate(range(_SERVER_NODE + 1, _SERVER_NODE + 1 + nodes))
        }
        self._pending: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        self._run = Run.create_empty(_RUN)
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = _RUN
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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages until their replies are pulled, and return their ids."""
        ids = []
        for message in messages:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number  # as Flower's own grids do
            self._pending[number] = message
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Call the app for each message, and yield the replies."""
        for number in message_ids:
            message = self._pending.pop(number, None)
            if message is not None:
                yield self._answer(message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Call the app for each message, and return all replies; there is no timeout."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as a Flower node does: a failure of the app is an error reply
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
