"""The in-process engine: a Flower Grid whose nodes are calls of a ClientApp in this process. No Ray, no ports, one base model.

A message is answered when its reply is pulled, so that one organization trains at a time and one reply is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from cotune.flower.local_grid import RUN, LocalGrid


class InProcessGrid(LocalGrid):
    """A grid of simulated nodes that all run one ClientApp.

    Args:
        client_app: The app.
        nodes: Their number.
    """

    def __init__(self, client_app: ClientApp, nodes: int = 1) -> None:
        super().__init__(nodes)
        self._app = client_app
        self._contexts = {
            node: Context(
                run_id=RUN,
                node_id=node,
                node_config=UserConfig({"partition-id": i, "num-partitions": nodes}),
                state=RecordDict(),
                run_config=UserConfig(),
            )
            for i, node in enumerate(self.nodes)
        }

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Call the app for each message, and yield the replies."""
        for number in message_ids:
            message = self._pending.pop(number, None)
            if message is not None:
                yield self.answer(message)

    def answer(self, message: Message) -> Message:
        """Call the app, and return the reply to a message that need not have been pushed."""
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as a Flower node does: a failure of the app is an error reply
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
