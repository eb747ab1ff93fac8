"""Calls of Flower's Fleet API as a member's node signs them."""

from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

NODE = 2**40 + 7
REQUEST = "f" * 64  # the message that is answered


def new_key() -> EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def public(key: EllipticCurvePrivateKey) -> bytes:
    """As Flower keeps it."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signed(key: EllipticCurvePrivateKey, ago: float = 0.0, over: str | None = None) -> dict[str, str]:
    """The headers. over: what was signed, if not the time."""
    at = (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()
    signature = key.sign((over or at).encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": b64encode(public(key)).decode(),
        "flwr-timestamp": at,
        "flwr-signature": b64encode(signature).decode(),
    }


def identifier(number: int) -> str:
    return f"{number:064x}"


def tree(leaves: int, first: int = 0) -> ObjectTree:
    """A message's, with so many arrays of one chunk each in one record."""
    arrays = [
        ObjectTree(object_id=identifier(first + 10 + 2 * i), children=[ObjectTree(object_id=identifier(first + 11 + 2 * i))])
        for i in range(leaves)
    ]
    record = ObjectTree(object_id=identifier(first + 3), children=arrays)
    return ObjectTree(object_id=identifier(first + 1), children=[ObjectTree(object_id=identifier(first + 2), children=[record])])


def announcement(objects: ObjectTree | None = None, node: int = NODE, **about: object) -> PushMessagesRequest:
    """An honest reply's. about: fields of its metadata."""
    objects = tree(3) if objects is None else objects
    fields: dict[str, object] = {"run_id": 5, "group_id": "1", "ttl": 60.0, "message_type": "train", "created_at": 1.8e9}
    fields |= {"src_node_id": node, "dst_node_id": 1, "reply_to_message_id": REQUEST, "message_id": objects.object_id, **about}
    metadata = Metadata(**fields)  # type: ignore[arg-type]
    return PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[Message(metadata=metadata)],
        message_object_trees=[objects],
        clientapp_runtime_list=[1.0],
    )
