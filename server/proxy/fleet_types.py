"""What the proxy needs to know of Flower's Fleet API, as types, so that the proxy imports none of Flower's modules.

The parsers that are passed in are those of the SuperLink itself: with a different parser, the proxy might check something else
than what the SuperLink reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


class ObjectTree(Protocol):
    """The identifiers of all objects of a message, nested as the objects are."""

    @property
    def object_id(self) -> str:
        """SHA-256 of the object, in hexadecimal digits."""

    @property
    def children(self) -> Iterable[ObjectTree]:
        """The objects that this one contains."""


class Metadata(Protocol):
    """The header of a message: node numbers, identifiers, and times in seconds."""

    @property
    def message_id(self) -> str:
        """The identifier of the message."""

    @property
    def reply_to_message_id(self) -> str:
        """The identifier of the message that it answers."""

    @property
    def src_node_id(self) -> int:
        """The sender's node number."""

    @property
    def dst_node_id(self) -> int:
        """The recipient's node number."""

    @property
    def ttl(self) -> float:
        """Seconds for which the message is valid."""

    @property
    def created_at(self) -> float:
        """When it was created, in seconds since 1970."""


class Node(Protocol):
    """The node that makes a call."""

    @property
    def node_id(self) -> int:
        """Flower's number of the node."""


class Message(Protocol):
    """A message without its content, which is sent object by object."""

    @property
    def metadata(self) -> Metadata:
        """The header of the message."""


class PushRequest(Protocol):
    """The content of a `push-messages`: the replies that a node announces."""

    @property
    def node(self) -> Node:
        """The caller."""

    @property
    def messages_list(self) -> Sequence[Message]:
        """The replies."""

    @property
    def message_object_trees(self) -> Sequence[ObjectTree]:
        """The objects of each reply."""

    @property
    def clientapp_runtime_list(self) -> Iterable[float]:
        """Seconds that the node worked on each reply."""


class PullResponse(Protocol):
    """The answer to a `pull-messages`: the requests for a node."""

    @property
    def message_object_trees(self) -> Sequence[ObjectTree]:
        """The objects of each request."""


@dataclass(frozen=True)
class FleetFormat:
    """Names, numbers and parsers of the Fleet API.

    Attributes:
        key_header: Lower-case name of the header with the caller's public key (PEM, in base64).
        signature_header: Of the header with the ECDSA signature over the value of `time_header` (in base64).
        time_header: Of the header with the time of the call (ISO 8601).
        max_age: Seconds for which a signature is valid.
        clock_tolerance: Seconds by which clocks may differ.
        server_node: The node number of the SuperLink itself.
        parse_push: Parses the content of a `push-messages`. Raises DecodeError.
        parse_pull: Parses an answer to a `pull-messages`. Raises DecodeError.
    """

    key_header: bytes
    signature_header: bytes
    time_header: bytes
    max_age: float
    clock_tolerance: float
    server_node: int
    parse_push: Callable[[bytes], PushRequest]
    parse_pull: Callable[[bytes], PullResponse]

    @property
    def authentication_headers(self) -> tuple[bytes, bytes, bytes]:
        """The names of the headers that authenticate the caller."""
        return self.key_header, self.signature_header, self.time_header
