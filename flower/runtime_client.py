"""A client of Flower's Runtime API, by which the server sends requests and receives replies.

Flower's own grid silently repeats a failed call, which hides what was lost with the first one; it waits a second for a missing
piece, and accepts a reply of any size. Here a failed call raises an exception; the calls and their order are the same.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import GetNodesRequest, PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf, make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import push_objects
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient

from cotune.flower.chunks import Pending, download, pull_reply
from cotune.flower.nodes import RegisteredNode

if TYPE_CHECKING:
    from flwr.superlink.grid.http_grid import HttpGrid

_IDLE_TIMEOUT = 200.0  # seconds for the rest of an answer; after 180 s the SuperLink gives up the node that sends it

RunStopped = RunNotRunningException  # raised by every call once the run was stopped

_Answer = TypeVar("_Answer")


class RuntimeClient(Protocol):
    """Calls of the Runtime API, made by several threads. A call that fails raises; RunStopped if the run was stopped."""

    def get_nodes(self) -> tuple[RegisteredNode, ...]:
        """Return the registered nodes."""
        ...

    def push(self, message: Message) -> str:
        """Send a request, and return its id; "" if the SuperLink did not accept it."""
        ...

    def list_replies(self, numbers: Sequence[str]) -> Mapping[str, Any]:
        """List the requests whose replies can be fetched now.

        A reply is listed only once: if this call or `fetch` fails, it may be lost.

        Args:
            numbers: Ids of requests.

        Returns:
            Id of the request -> what `fetch` needs to know of the reply.
        """
        ...

    def fetch(self, answer: Any, max_bytes: int, came: Callable[[], None]) -> Message | None:
        """Return a reply; None if it is not uploaded yet.

        Args:
            answer: From `list_replies`.
            max_bytes: Limit of the size of its arrays.
            came: Called for every piece that arrives, by several threads.

        Raises:
            TooLarge: If it is larger.
            Aborted: If the rest of it does not arrive.
            Malformed: If it is not a message.
        """
        ...


def open_runtime_client(grid: Grid) -> RuntimeClient:
    """Return a client of the SuperLink to which the grid is connected; for any other grid, one that calls the grid."""
    from flwr.superlink.grid.http_grid import HttpGrid  # late: it loads what a SuperLink keeps its database with

    return _SuperLinkClient(grid) if isinstance(grid, HttpGrid) else _GridClient(grid)


class _GridClient:
    """Uses only the public methods of a grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_nodes(self) -> tuple[RegisteredNode, ...]:
        """Return the registered nodes."""
        return tuple(RegisteredNode.from_info(node) for node in self._grid.get_nodes())

    def push(self, message: Message) -> str:
        numbers = list(self._grid.push_messages([message]))
        return numbers[0] if numbers else ""

    def list_replies(self, numbers: Sequence[str]) -> Mapping[str, str]:
        return {number: number for number in numbers}

    def fetch(self, answer: str, max_bytes: int, came: Callable[[], None]) -> Message | None:
        return pull_reply(self._grid, answer)


class _SuperLinkClient:
    """Calls the SuperLink as the grid of a process that its executor started does, over its own connections."""

    def __init__(self, grid: HttpGrid) -> None:
        self._run = grid.run.run_id
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._end_lock = threading.Lock()  # taken once the process is being ended
        self._client = RuntimeHttpClient.from_server_address(
            grid._addr,
            grid._insecure,
            grid._cert,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                RuntimeTokenHttpInterceptor(token=grid._token),
            ],
        )

    def get_nodes(self) -> tuple[RegisteredNode, ...]:
        """Return the registered nodes."""
        nodes = self._call(self._client.GetNodes, GetNodesRequest()).nodes
        return tuple(RegisteredNode.from_info(node) for node in nodes)

    def push(self, message: Message) -> str:
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[get_object_tree(message)],
            )
            answer = self._call(self._client.PushMessages, request)
            if not answer.message_ids[0]:
                return ""
            send = make_push_object_fn_protobuf(self._as_call(self._client.PushObject), self._node, self._run, answer.session_id)
            push_objects(get_all_nested_objects(message), send, object_ids_to_push=set(answer.objects_to_push))
        return str(answer.message_ids[0])

    def list_replies(self, numbers: Sequence[str]) -> dict[str, ObjectTree]:
        answer = self._call(self._client.PullMessages, PullAppMessagesRequest(message_ids=numbers))
        replies = zip(answer.messages_list, answer.message_object_trees, strict=True)
        return {reply.metadata.reply_to_message_id: tree for reply, tree in replies}

    def fetch(self, answer: ObjectTree, max_bytes: int, came: Callable[[], None]) -> Message:
        pull = make_pull_object_fn_protobuf(self._as_call(self._client.PullObject), self._node, self._run)
        message = download(answer, _retry_later(pull, came), max_bytes, _IDLE_TIMEOUT)
        received = ConfirmMessageReceivedRequest(node=self._node, run_id=self._run, message_object_id=answer.object_id)
        with suppress(httpx.HTTPError):  # the SuperLink then keeps what is no longer needed
            self._call(self._client.ConfirmMessageReceived, received)
        return message

    def _as_call(self, method: Callable[[Any], _Answer]) -> Callable[[Any], _Answer]:
        return lambda request: self._call(method, request)

    def _call(self, method: Callable[[Any], _Answer], request: Any) -> _Answer:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.FORBIDDEN:
                raise RunStopped from None
            if error.response.status_code == httpx.codes.UNAUTHORIZED:  # the SuperLink has restarted and lost its state
                self._end_process()
            raise

    def _end_process(self) -> None:
        """End this process, once, as Flower's own client does; another is started. A second signal would interrupt that."""
        if self._end_lock.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGINT)


def _retry_later(pull: Callable[[str], bytes], came: Callable[[], None]) -> Callable[[str], bytes]:
    """Report a piece as pending while the SuperLink is unreachable or busy."""

    def patient(number: str) -> bytes:
        try:
            content = pull(number)
            came()
            return content
        except httpx.TransportError:
            raise Pending(number) from None
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                raise Pending(number) from None
            raise

    return patient
