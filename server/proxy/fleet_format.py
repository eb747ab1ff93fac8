"""What the proxy has to know of Flower's Fleet API. It is passed in, so that the proxy depends on none of Flower's modules.

What is passed in parses messages with the classes that the SuperLink itself parses them with: two parsers that read one message
differently would let through what was never checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


class ObjectTree(Protocol):
    """The identifiers of all objects of a message, nested as the objects are."""

    @property
    def object_id(self) -> str: ...
    @property
    def children(self) -> Iterable[ObjectTree]: ...


class Metadata(Protocol):
    """The header of a message: node numbers, identifiers, and times in seconds."""

    @property
    def message_id(self) -> str: ...
    @property
    def reply_to_message_id(self) -> str: ...
    @property
    def src_node_id(self) -> int: ...
    @property
    def dst_node_id(self) -> int: ...
    @property
    def ttl(self) -> float: ...
    @property
    def created_at(self) -> float: ...


class Node(Protocol):
    @property
    def node_id(self) -> int: ...


class Message(Protocol):
    @property
    def metadata(self) -> Metadata: ...


class PushRequest(Protocol):
    """The content of a `push-messages`: the replies that a node announces."""

    @property
    def node(self) -> Node: ...
    @property
    def messages_list(self) -> Sequence[Message]: ...
    @property
    def message_object_trees(self) -> Sequence[ObjectTree]: ...
    @property
    def clientapp_runtime_list(self) -> Iterable[float]: ...


class PullResponse(Protocol):
    """The answer to a `pull-messages`: the requests that a node is given."""

    @property
    def message_object_trees(self) -> Sequence[ObjectTree]: ...


@dataclass(frozen=True)
class FleetFormat:
    """Names, numbers and parsers of the Fleet API.

    Attributes:
        key_header: Lower-case name of the header with the caller's public key (PEM, in base64).
        signature_header: Of the header with the ECDSA signature over the value of `time_header` (in base64).
        time_header: Of the header with the time of the call (ISO 8601).
        max_age: Seconds for which a signature holds.
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
        """The names of the headers that show who calls."""
        return self.key_header, self.signature_header, self.time_header
