"""A client of Flower's Fleet API, by which a node receives requests and sends replies.

Flower's own connection (flwr.supernode.fleet_http_connection) ends the whole process when a server restarts or does not know a
key, and waits without end where TLS is wrong. Here these are exceptions, so that a node can stay; the calls and their order are
the same.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf, make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, push_objects
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from cotune.flower.chunks import ChunkedMessage, download_chunks
from cotune.flower.http_limits import harden_http_client
from cotune.printable import printable
from cotune.protocol.connectivity import describe_error

_MAX_REQUEST_BYTES = 4 * 2**30  # of a request: more than any plan's
_IDLE_TIMEOUT = 10.0  # for the rest of a request that the server is uploading

_REFUSED_NODE = {httpx.codes.UNAUTHORIZED, httpx.codes.PRECONDITION_FAILED}
_REFUSED_CALL = {
    httpx.codes.BAD_REQUEST,
    httpx.codes.LENGTH_REQUIRED,
    httpx.codes.REQUEST_ENTITY_TOO_LARGE,
    httpx.codes.REQUEST_HEADER_FIELDS_TOO_LARGE,
    httpx.codes.HTTP_VERSION_NOT_SUPPORTED,
}
_BUSY = {httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT}
# bytes that are looked at for a reason; characters of it that are shown
_MAX_ERROR_BYTES = 4096
_MAX_REASON_LENGTH = 300
_GENERIC_REASONS = ("Invalid SuperNode authentication",)  # of Flower; its other sentences end with a full stop

_Answer = TypeVar("_Answer")


class FleetError(Exception):
    """The server cannot be reached or does not accept this node. It may help to wait and to connect again."""


class NodeRejected(FleetError):
    """The server does not know this node, or it is online already."""


class RequestExpired(FleetError):
    """The server does not wait for a reply to this request any more."""


@dataclass(frozen=True)
class AnnouncedRequest:
    """A request as the server announces it: everything but its content.

    Attributes:
        header: The message without content.
        tree: The ids of its objects.
    """

    header: Message
    tree: ObjectTree

    @property
    def run(self) -> int:
        return self.header.metadata.run_id

    @property
    def round(self) -> str:
        return self.header.metadata.group_id

    @property
    def seconds(self) -> float:
        """The seconds for which the server still waits for a reply to a request that was announced just now.

        By this machine's clock, unless that is far off: what the server announces has time left.
        """
        about = self.header.metadata
        left = about.created_at + about.ttl - time.time()
        return left if 0 < left <= about.ttl else about.ttl

    def to_bytes(self) -> bytes:
        both = PullMessagesResponse(messages_list=[message_to_proto(self.header)], message_object_trees=[self.tree])
        content: bytes = both.SerializeToString()
        return content

    @classmethod
    def from_bytes(cls, content: bytes) -> AnnouncedRequest:
        """Parse what `to_bytes` has given. Raises ValueError for anything else."""
        try:
            return cls._first_of(PullMessagesResponse.FromString(content))
        except Exception as error:
            raise ValueError(f"not a request: {error}") from None

    @classmethod
    def _first_of(cls, response: Any) -> AnnouncedRequest:
        return cls(message_from_proto(response.messages_list[0]), response.message_object_trees[0])


class FleetClient:
    """A connection to a server, opened by `connect`."""

    def __init__(self, client: FleetHttpClient, node_id: int) -> None:
        self.node_id = node_id
        self._client = client
        self._node = Node(node_id=node_id)
        self._rejected = threading.Event()
        self._left = False
        self._heartbeat_lock = threading.Lock()

    def receive(self) -> AnnouncedRequest | None:
        """Return the next request; None where there is none. The server announces each only once."""
        self.check_known()
        response = _call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        return AnnouncedRequest._first_of(response) if response.messages_list else None

    def check_known(self) -> None:
        """Raise NodeRejected where a heartbeat was refused, as that of a key which was replaced or revoked."""
        if self._rejected.is_set():
            raise NodeRejected("the server does not know this node any more")

    def open(self, request: AnnouncedRequest) -> ChunkedMessage:
        """Download a request. It may be downloaded again until it is confirmed.

        Raises:
            Aborted: If the rest of it does not arrive.
            TooLarge: If it is too large; no more than the limit is ever taken.
            Malformed: If it is no message.
        """
        pull = make_pull_object_fn_protobuf(self._calling(self._client.PullObject), self._node, request.run)
        parcel = download_chunks(request.tree, pull, _MAX_REQUEST_BYTES, _IDLE_TIMEOUT)
        parcel.header("")  # anyone who is given it can answer it
        return parcel

    def bundle(self, run: int) -> bytes:
        """Download the bundle (FAB) that a run was started with: a zip archive."""
        about = _call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run)).run
        answer = _call(self._client.GetFab, GetFabRequest(node=self._node, hash_str=about.fab_hash, run_id=run))
        content: bytes = answer.fab.content
        return content

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply.

        Args:
            reply: The reply.
            seconds: How long it took; the server shows it.

        Raises:
            FleetError: If it cannot be sent.
        """
        _restore_ttl(reply)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        header = message_to_proto(remove_content_from_message(reply))
        run = reply.metadata.run_id
        with no_object_id_recompute():
            push = PushMessagesRequest(
                node=self._node,
                messages_list=[header],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            wanted = _call(self._client.PushMessages, push)
            send = make_push_object_fn_protobuf(self._calling(self._client.PushObject), self._node, run, wanted.session_id)
            try:
                push_objects(get_all_nested_objects(reply), send, object_ids_to_push=set(wanted.objects_to_push))
            except ObjectPushError as error:
                raise FleetError(str(error)) from None

    def confirm(self, request: AnnouncedRequest) -> None:
        """Let the server forget the content of a request that was downloaded; it would fail to upload the rest before."""
        confirmation = ConfirmMessageReceivedRequest(
            node=self._node, run_id=request.run, message_object_id=request.tree.object_id
        )
        _call(self._client.ConfirmMessageReceived, confirmation)

    def leave(self) -> None:
        """Tell the server that this node goes offline. A heartbeat after that would keep it online for another minute."""
        with self._heartbeat_lock:
            self._left = True
            _call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id))

    def heartbeat(self) -> bool:
        """Send a heartbeat; return whether the server was reached. A refusal is raised by the next `receive`."""
        try:
            with self._heartbeat_lock:
                if not self._left and not _send_heartbeat(self._client, self._node):
                    self._rejected.set()
        except NodeRejected:
            self._rejected.set()
        except FleetError:
            return False
        return True

    @staticmethod
    def _calling(method: Callable[[Any], _Answer]) -> Callable[[Any], _Answer]:
        return lambda request: _call(method, request)


def _restore_ttl(reply: Message) -> None:
    """Flower gives a reply the time that is left of its request, by this machine's clock; one that is far off leaves nothing."""
    about = reply.metadata
    if about.ttl <= 0:
        end = about.created_at + about.ttl
        about.__dict__["_ttl"] = 1.0
        about.__dict__["_created_at"] = end - 1.0


@contextmanager
def connect(
    address: str,
    root_certificates: bytes | None,
    key: EllipticCurvePrivateKey,
    known: int | None = None,
    reconnect: bool = False,
) -> Iterator[FleetClient]:
    """Connect to a server over TLS, with heartbeats.

    Args:
        address: host:port.
        root_certificates: PEM; None: those that this machine trusts.
        key: Of the node.
        known: The node id of a connection that broke off. It goes on at once, where a new one would be refused until the server
            has missed the old one's heartbeats (60 s).
        reconnect: Whether that node leaves first, so that the server sees it come back and asks it again.

    Raises:
        FleetError: If the server cannot be reached or does not accept the node.
    """
    with FleetHttpClient.from_server_address(
        address, False, root_certificates, interceptors=[NodeAuthHttpInterceptor(key, key.public_key())]
    ) as client:
        harden_http_client(client._client)
        fleet = FleetClient(client, _activate(client, key, known, reconnect))
        heartbeats = HeartbeatSender(fleet.heartbeat)
        heartbeats.start()
        try:
            yield fleet
        finally:
            if heartbeats.is_running:
                heartbeats.stop()


def _activate(client: FleetHttpClient, key: EllipticCurvePrivateKey, known: int | None, reconnect: bool) -> int:
    if known is not None and _is_known(client, known):
        if not reconnect:
            return known
        _call(client.DeactivateNode, DeactivateNodeRequest(node_id=known))
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    node_id: int = _call(client.ActivateNode, request).node_id
    return node_id


def _is_known(client: FleetHttpClient, node_id: int) -> bool:
    try:
        return _send_heartbeat(client, Node(node_id=node_id))
    except NodeRejected:
        return False


def _send_heartbeat(client: FleetHttpClient, node: Node) -> bool:
    request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    return bool(_call(client.SendNodeHeartbeat, request).success)


def _call(method: Callable[[Any], _Answer], request: Any) -> _Answer:
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise _build_error(error.response) from None
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise FleetError(describe_error(error, error.request.url.netloc.decode("ascii"))) from None
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise FleetError(_describe_cut(error)) from None
    except httpx.HTTPError as error:
        raise FleetError(f"the server does not answer ({error or type(error).__name__})") from None
    except ValueError as error:
        raise FleetError(f"the server's answer is not Flower's ({error})") from None


def _describe_cut(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.NetworkError) or str(error).startswith("Server disconnected"):
        return (
            f"the server closed the connection ({error or type(error).__name__}): it may be stopping, or have made room for"
            " other connections"
        )
    return f"the connection to the server broke off ({error})"


def _build_error(response: httpx.Response) -> FleetError:
    """The error for a response: by its status and, where it has one of its own, the server's reason."""
    status = response.status_code
    said = _read_reason(response)
    if said and status in _REFUSED_NODE:
        return NodeRejected(f"the server does not let this node in: {said}{_describe_clock_skew(response.headers.get('date'))}")
    if said and status in _REFUSED_CALL:
        return FleetError(f"the server refuses what this node sends: {said}")
    if said and status in _BUSY:
        return FleetError(f"the server cannot take this now: {said}")
    if status == httpx.codes.UNAUTHORIZED:
        return NodeRejected(
            "the server does not accept the key: expected one that the coordinator has registered (`cotune server invite`), and"
            f" clocks that agree within 5 minutes{_describe_clock_skew(response.headers.get('date'))}"
        )
    if status == httpx.codes.PRECONDITION_FAILED:
        return NodeRejected(
            "the server does not let this node in: its key is not registered (`cotune server invite`; a server that runs"
            " follows within seconds), or a node with the same key is online already, perhaps on another machine, or was until a"
            " minute ago"
        )
    if status == httpx.codes.FORBIDDEN:
        return RequestExpired("the run is over, or not for this node")
    if status == httpx.codes.NOT_FOUND:
        return FleetError("the server has nothing at this place: expected the public port of a federation at this address")
    if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.INSUFFICIENT_STORAGE):
        return FleetError(
            f"the server's quota for this organization is used up (status {status}): wait, ask the coordinator,"
            " and look for another node that has this key"
        )
    return FleetError(f"the server answered with status {status}")


def _read_reason(response: httpx.Response) -> str:
    """The reason of a refusal in one line; "" where there is none, or only what every refusal of Flower's says."""
    try:
        found = json.loads(response.content[:_MAX_ERROR_BYTES])["detail"]
    except (ValueError, KeyError, TypeError, RecursionError, httpx.StreamError):
        return ""
    words = printable(" ".join(found.split())) if isinstance(found, str) else ""
    return "" if words in _GENERIC_REASONS or words.endswith(".") else words[:_MAX_REASON_LENGTH]


def _describe_clock_skew(date: str | None) -> str:
    """How far the clocks are apart, where the server states its time; otherwise ""."""
    try:
        seconds = time.time() - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return ""
    direction = "ahead of" if seconds > 0 else "behind"
    return f"; this machine's is {abs(seconds) / 60:.0f} minutes {direction} the server's" if abs(seconds) > 60 else ""
