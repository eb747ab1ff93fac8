"""Rules for the head of a request: calls of Flower's Fleet API pass from the public port to the SuperLink, and nothing else.

The SuperLink serves Fleet, Control and Runtime on one port, and its Control API asks nobody who they are.
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
    """How much a client may take. Until its key and signature are checked it may take a head, and no content.

    Flower cuts tensors into chunks of 5 MiB, each in a request of its own, so that no limit need grow with the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    head: int = Field(16 * KIB, ge=1024)  # bytes of a request's line and headers
    body: int = Field(4 * KIB, ge=64)  # bytes of a request's content, but for the next two calls
    push_messages: int = Field(MIB, ge=64)  # the announcement of a reply: a header, and the tree of its objects
    push_object: int = Field(6 * MIB, ge=64)  # one object: a chunk of 5 MiB, and what Flower writes around it
    tree: int = Field(4096, ge=8)  # objects of a reply; the SuperLink's database stands still for .5 ms for each
    in_flight: int = Field(256 * MIB, ge=64)  # bytes of content on their way at a time: the SuperLink holds them in memory
    in_flight_per_member: int = Field(24 * MIB, ge=64)  # Flower sends two objects at a time
    connections: int = Field(256, ge=1)  # of members at a time; each needs two file descriptors
    connections_per_member: int = Field(64, ge=1)  # a node holds up to ten or so
    strangers: int = Field(64, ge=1)  # connections that no member has signed a request on yet; the oldest makes room
    connections_per_address: int = Field(64, ge=1)  # an IPv6 network /64 is one address
    first_byte: float = Field(5.0, gt=0)  # seconds for it
    timeout: float = Field(30.0, gt=0)  # seconds for a handshake, for a next head to be complete, and for any content
    bytes_per_second: int = Field(16 * KIB, ge=1)  # the slowest that content may come or be taken
    queue: float = Field(10.0, ge=0)  # seconds that a request waits while too much is in flight
    answer: float = Field(120.0, gt=0)  # seconds for the SuperLink to answer; Flower's clients wait for 30
    linger: float = Field(5.0, gt=0)  # seconds to drop what a refused client still sends: cut at once, it loses the answer
    grace: float = Field(10.0, ge=0)  # seconds for requests under way when the front stops

    def get_transfer_seconds(self, size: int) -> float:
        """Return the seconds that so many bytes may take on their way."""
        return self.timeout + size / self.bytes_per_second

    def get_content_limit(self, call: str) -> tuple[str, int]:
        """Return the name of the limit of a call's content, and its bytes."""
        name = {"push-messages": "push_messages", "push-object": "push_object"}.get(call, "body")
        return name, int(getattr(self, name))


@dataclass(frozen=True)
class Refusal:
    """The answer to a request that does not pass.

    Flower takes 403 for a run that has ended, ends at 401, and tries again after 429, 502, 503 and 504: none of them is for
    what will never pass.

    Attributes:
        status: Of HTTP.
        reason: A sentence, which the client's log shows.
        code: Flower's own, where it has one.
    """

    status: int
    reason: str
    code: int | None = None


_FLEET_PATH = re.compile(
    rb"/v1/fleet/([a-z]+(?:-[a-z]+)*)"
)  # no query, escapes or dots: nothing that two parsers may read differently
_FORWARDED_HEADERS = frozenset({b"accept", b"content-length", b"content-type", b"date", b"user-agent"})
_REFUSED_HEADERS = (b"transfer-encoding", b"content-encoding", b"upgrade", b"expect")


def reason_to_refuse(request: h11.Request, limits: Limits) -> Refusal | None:
    """Return why a request, which h11 has read, may not pass; None where it may."""
    if request.method != b"POST" or not _FLEET_PATH.fullmatch(request.target):
        return Refusal(404, "there is nothing here but Flower's Fleet API: give this address to a SuperNode")
    if request.http_version != b"1.1":
        return Refusal(505, f"this is HTTP/{request.http_version.decode()}, expected HTTP/1.1")
    if sum(len(name) + len(value) for name, value in request.headers) > limits.head:  # h11 measures incomplete heads only
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
    """Return the name of a call, such as push-object; "" where it is none of the Fleet API."""
    found = _FLEET_PATH.fullmatch(request.target)
    return found[1].decode() if found else ""


def content_length(request: h11.Request) -> int:
    """Return the bytes of content that a request declares; 0 where it declares none."""
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)


def forwarded_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of a request or an answer that Flower's calls need, names in lower case; no others are forwarded."""
    lowered = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lowered if name in _FORWARDED_HEADERS or name.startswith(b"flwr-")]
