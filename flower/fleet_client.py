"""A client of Flower's Fleet API, by which a node receives requests and sends replies.

Flower's own connection (flwr.supernode.fleet_http_connection) ends the whole process when a server restarts or does not know a
key, and waits forever if the TLS handshake fails. Here these cases are exceptions, so that a node can continue; the calls and
their order are the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
from cotune.flower.fleet_errors import Answer, FleetError, NodeRejected, call
from cotune.flower.http_limits import harden_http_client

_MAX_REQUEST_BYTES = 4 * 2**30  # of a request; no plan has larger ones
_IDLE_TIMEOUT = 10.0  # for the rest of a request that the server is uploading


@dataclass(frozen=True)
class AnnouncedRequest:
    """A request as the server announces it, without its content.

    Attributes:
        header: The message without content.
        tree: The ids of its objects.
    """

    header: Message
    tree: ObjectTree

    @property
    def run(self) -> int:
        """Flower's id of the run."""
        return self.header.metadata.run_id

    @property
    def round(self) -> str:
        """The round, as text."""
        return self.header.metadata.group_id

    @property
    def seconds(self) -> float:
        """The seconds for which the server still waits for a reply, if the request was announced just now.

        They follow from this machine's clock unless it is far off: an announced request has time left.
        """
        about = self.header.metadata
        left = about.created_at + about.ttl - time.time()
        return left if 0 < left <= about.ttl else about.ttl

    def to_bytes(self) -> bytes:
        """Return the announcement in Flower's format, to be stored."""
        both = PullMessagesResponse(messages_list=[message_to_proto(self.header)], message_object_trees=[self.tree])
        content: bytes = both.SerializeToString()
        return content

    @classmethod
    def from_bytes(cls, content: bytes) -> AnnouncedRequest:
        """Parse the result of `to_bytes`; raises ValueError for anything else."""
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
        """Return the next request; None if there is none. The server announces each request only once."""
        self.check_known()
        response = call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        return AnnouncedRequest._first_of(response) if response.messages_list else None

    def check_known(self) -> None:
        """Raise NodeRejected if a heartbeat was refused, as happens after the key was replaced or revoked."""
        if self._rejected.is_set():
            raise NodeRejected("the server does not know this node any more")

    def open(self, request: AnnouncedRequest) -> ChunkedMessage:
        """Download a request. It may be downloaded again until it is confirmed.

        Raises:
            Aborted: If the rest of it does not arrive.
            TooLarge: If it is larger than the limit; the rest is not downloaded.
            Malformed: If it is not a message.
        """
        pull = make_pull_object_fn_protobuf(self._calling(self._client.PullObject), self._node, request.run)
        parcel = download_chunks(request.tree, pull, _MAX_REQUEST_BYTES, _IDLE_TIMEOUT)
        parcel.header("")  # fails now if the header, which a reply needs, is malformed
        return parcel

    def bundle(self, run: int) -> bytes:
        """Download the bundle (FAB) that a run was started with: a zip archive."""
        about = call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run)).run
        answer = call(self._client.GetFab, GetFabRequest(node=self._node, hash_str=about.fab_hash, run_id=run))
        content: bytes = answer.fab.content
        return content

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply.

        Args:
            reply: The reply.
            seconds: How long the node worked on it; the server shows it.

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
            wanted = call(self._client.PushMessages, push)
            send = make_push_object_fn_protobuf(self._calling(self._client.PushObject), self._node, run, wanted.session_id)
            try:
                push_objects(get_all_nested_objects(reply), send, object_ids_to_push=set(wanted.objects_to_push))
            except ObjectPushError as error:
                raise FleetError(str(error)) from None

    def confirm(self, request: AnnouncedRequest) -> None:
        """Let the server delete the content of a downloaded request; before the download is complete, that would break it."""
        confirmation = ConfirmMessageReceivedRequest(
            node=self._node, run_id=request.run, message_object_id=request.tree.object_id
        )
        call(self._client.ConfirmMessageReceived, confirmation)

    def leave(self) -> None:
        """Notify the server that this node goes offline. A later heartbeat would keep it online for another minute."""
        with self._heartbeat_lock:
            self._left = True
            call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id))

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
    def _calling(method: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
        return lambda request: call(method, request)


def _restore_ttl(reply: Message) -> None:
    """Restore a reply's lifetime, which Flower computes by this machine's clock; if that is far off, nothing would be left."""
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
        call(client.DeactivateNode, DeactivateNodeRequest(node_id=known))
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    node_id: int = call(client.ActivateNode, request).node_id
    return node_id


def _is_known(client: FleetHttpClient, node_id: int) -> bool:
    try:
        return _send_heartbeat(client, Node(node_id=node_id))
    except NodeRejected:
        return False


def _send_heartbeat(client: FleetHttpClient, node: Node) -> bool:
    request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    return bool(call(client.SendNodeHeartbeat, request).success)
