"""How much of the proxy a connection may use, in bytes and seconds, and how many there may be at a time.

What a member may use in an hour or a day is in `member_quotas`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

KIB = 2**10
MIB = 2**20


class Limits(BaseModel):
    """How much of the proxy a client may use. Until its key and signature are checked, only the head of a request is read.

    Flower splits tensors into chunks of 5 MiB, each in its own request, so that no limit needs to grow with the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    head: int = Field(16 * KIB, ge=1024)  # bytes of a request's line and headers
    body: int = Field(4 * KIB, ge=64)  # bytes of a request's content, except for the next two calls
    push_messages: int = Field(MIB, ge=64)  # bytes of a reply's announcement: a header, and the tree of its objects
    push_object: int = Field(6 * MIB, ge=64)  # bytes of one object: a chunk of 5 MiB with Flower's framing
    tree: int = Field(4096, ge=8)  # objects of a reply; each locks the SuperLink's database for 0.5 ms
    in_flight: int = Field(256 * MIB, ge=64)  # bytes of content in transfer at a time: the SuperLink keeps them in memory
    in_flight_per_member: int = Field(24 * MIB, ge=64)  # Flower sends two objects at a time
    connections: int = Field(256, ge=1)  # of members at a time; each needs two file descriptors
    connections_per_member: int = Field(64, ge=1)  # a node opens about ten
    strangers: int = Field(64, ge=1)  # connections without a request that a member signed; the oldest is evicted
    connections_per_address: int = Field(64, ge=1)  # an IPv6 network /64 is one address
    first_byte: float = Field(5.0, gt=0)  # seconds until the first byte of a connection
    timeout: float = Field(30.0, gt=0)  # seconds for a handshake, for the next head, and for any content
    bytes_per_second: int = Field(16 * KIB, ge=1)  # the lowest rate at which a client may send or read content
    queue: float = Field(10.0, ge=0)  # seconds that a request waits while too much is in flight
    answer: float = Field(120.0, gt=0)  # seconds for the SuperLink to answer; Flower's clients wait for 30
    linger: float = Field(5.0, gt=0)  # seconds to read on after a refusal; closing at once would lose the answer
    grace: float = Field(10.0, ge=0)  # seconds for requests in progress when the front stops

    def get_transfer_seconds(self, size: int) -> float:
        """Return the seconds that a transfer of `size` bytes may take."""
        return self.timeout + size / self.bytes_per_second

    def get_content_limit(self, call: str) -> tuple[str, int]:
        """Return the name of the limit on a call's content, and its value in bytes."""
        name = {"push-messages": "push_messages", "push-object": "push_object"}.get(call, "body")
        return name, int(getattr(self, name))
