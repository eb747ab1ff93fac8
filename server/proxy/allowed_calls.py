"""Check the head of a request: only calls of Flower's Fleet API pass from the public port to the SuperLink.

The SuperLink serves its Fleet, Control and Runtime APIs on one port, and the Control API requires no authentication.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import h11
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
        """Return the seconds that a transfer of so many bytes may take."""
        return self.timeout + size / self.bytes_per_second

    def get_content_limit(self, call: str) -> tuple[str, int]:
        """Return the name of the limit on a call's content, and its value in bytes."""
        name = {"push-messages": "push_messages", "push-object": "push_object"}.get(call, "body")
        return name, int(getattr(self, name))


@dataclass(frozen=True)
class Refusal:
    """The answer to a request that does not pass.

    Flower's client interprets 403 as a run that has ended, stops at 401, and tries again after 429, 502, 503 and 504. None of
    them is used for a request that can never pass.

    Attributes:
        status: HTTP status.
        reason: A sentence for the client's log.
        code: Flower's error code, if it has one.
    """

    status: int
    reason: str
    code: int | None = None


_FLEET_PATH = re.compile(
    rb"/v1/fleet/([a-z]+(?:-[a-z]+)*)"
)  # no query, escapes or dots, which two parsers might interpret differently
_FORWARDED_HEADERS = frozenset({b"accept", b"content-length", b"content-type", b"date", b"user-agent"})
_REFUSED_HEADERS = (b"transfer-encoding", b"content-encoding", b"upgrade", b"expect")


def reason_to_refuse(request: h11.Request, limits: Limits) -> Refusal | None:
    """Return why a request may not pass; None if it may.

    Args:
        request: Its head, as parsed by h11.
        limits: For the size of the head and the content.
    """
    if request.method != b"POST" or not _FLEET_PATH.fullmatch(request.target):
        return Refusal(404, "there is nothing here but Flower's Fleet API: give this address to a SuperNode")
    if request.http_version != b"1.1":
        return Refusal(505, f"this is HTTP/{request.http_version.decode()}, expected HTTP/1.1")
    if sum(len(name) + len(value) for name, value in request.headers) > limits.head:  # h11 limits only incomplete heads
        return Refusal(431, f"the headers have more than {limits.head} bytes: raise limits.head at the server")
    names = [name for name, _ in request.headers]
    for name in _REFUSED_HEADERS:
        if name in names:
            return Refusal(400, f"the header {name.decode()} is not accepted: send the content with its Content-Length")
    if names.count(b"content-length") != 1:
        return Refusal(411, f"there are {names.count(b'content-length')} headers Content-Length, expected one")
    size = content_length(request)
    name_of_limit, most = limits.get_content_limit(get_call(request))
    if size > most:
        return Refusal(413, f"the content has {size} bytes, expected at most {most}: raise limits.{name_of_limit} at the server")
    return None


def get_call(request: h11.Request) -> str:
    """Return the name of a Fleet API call, such as push-object; "" for any other request."""
    found = _FLEET_PATH.fullmatch(request.target)
    return found[1].decode() if found else ""


def content_length(request: h11.Request) -> int:
    """Return the content length in bytes that a request declares; 0 if it declares none."""
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)


def forwarded_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers to forward of a request or an answer: those that Flower needs, with names in lower case."""
    lowered = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lowered if name in _FORWARDED_HEADERS or name.startswith(b"flwr-")]
