"""An organization's node as the SuperLink knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from flwr.proto.node_pb2 import NodeInfo


@dataclass(frozen=True)
class RegisteredNode:
    """A node whose key is registered at the SuperLink.

    Attributes:
        id: Its number, to which messages are addressed.
        key: Its public key (PEM).
        online: Whether its heartbeats arrive.
        last_online: When it last connected, as the SuperLink reports it.
        until: When it goes, or went, offline without another heartbeat, in seconds since 1970.
    """

    id: int
    key: bytes
    online: bool
    last_online: str = ""
    until: float = 0.0

    @classmethod
    def from_info(cls, info: NodeInfo) -> Self:
        """Convert Flower's message. A grid that does not report the states of nodes lists only those that are online."""
        return cls(info.node_id, info.public_key, info.status in ("", "online"), info.last_activated_at, info.online_until)
