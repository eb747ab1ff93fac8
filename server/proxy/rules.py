"""What may pass from the public port to the SuperLink: calls of Flower's Fleet API, and nothing else.

The SuperLink serves Fleet, Control and Runtime on one port, and its Control API asks nobody who they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import h11
from pydantic import Field

from cotune.models.table import Table

__all__ = ["Limits", "Refusal", "content_length", "passed_on", "reason_to_refuse"]


class Limits(Table):
    """How much a client may take, whoever it is: nothing is authenticated before the SuperLink.

    Flower cuts tensors into chunks of 5 MiB, each in a request of its own, so that `body` need not grow with the model.
    """

    head: int = Field(16 * 1024, ge=1024)  # bytes of a request's line and headers
    body: int = Field(16 * 1024 * 1024, ge=1024)  # bytes of a request's content
    connections: int = Field(256, ge=1)  # at a time; each needs two file descriptors
    connections_per_address: int = Field(64, ge=1)  # a SuperNode holds up to ten or so
    patience: float = Field(30.0, gt=0)  # seconds for a handshake, for a next head to be complete, and for any content
    bytes_per_second: int = Field(16 * 1024, ge=1)  # the slowest that content may come or be taken
    answer: float = Field(120.0, gt=0)  # seconds for the SuperLink to answer; Flower's clients wait for 30
    linger: float = Field(
        5.0, gt=0
    )  # seconds to take what a refused client still sends: a connection cut at once loses the answer
    grace: float = Field(10.0, ge=0)  # seconds for requests under way when the front stops

    def seconds_for(self, size: int) -> float:
        """How long so many bytes may take on the way."""
        return self.patience + size / self.bytes_per_second


@dataclass(frozen=True)
class Refusal:
    """An HTTP status, and a sentence for whoever reads the other side's log.

    Flower takes 403 for a run that has ended, ends at 401, and tries again after 429, 502, 503 and 504: none of them is for
    what will never pass.
    """

    status: int
    reason: str


_CALL = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")  # no query, no escapes, no dots: nothing that two parsers may read differently
_PASSED = frozenset(
    {b"accept", b"accept-encoding", b"content-encoding", b"content-length", b"content-type", b"date", b"user-agent"}
)


def reason_to_refuse(request: h11.Request, limits: Limits) -> Refusal | None:
    """Why a request may not pass; None when it may. It is well-formed: h11 has read it."""
    if request.method != b"POST" or not _CALL.fullmatch(request.target):
        return Refusal(404, "there is nothing here but Flower's Fleet API: give this address to a SuperNode")
    if request.http_version != b"1.1":
        return Refusal(505, f"this is HTTP/{request.http_version.decode()}, expected HTTP/1.1")
    if sum(len(name) + len(value) for name, value in request.headers) > limits.head:  # h11 measures incomplete heads only
        return Refusal(431, f"the headers have more than {limits.head} bytes: raise limits.head at the server")
    names = [name for name, _ in request.headers]
    for name in (b"transfer-encoding", b"upgrade", b"expect"):
        if name in names:
            return Refusal(400, f"the header {name.decode()} is not accepted: send the content with its Content-Length")
    if names.count(b"content-length") != 1:
        return Refusal(411, f"there are {names.count(b'content-length')} headers Content-Length, expected one")
    size = content_length(request)
    if size > limits.body:
        return Refusal(413, f"the content has {size} bytes, expected at most {limits.body}: raise limits.body at the server")
    return None


def content_length(request: h11.Request) -> int:
    """The size that a request declares, in bytes; 0 without."""
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)


def passed_on(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Those that Flower's calls need, of a request or an answer: all else, such as who the client says it is, stays here."""
    lowered = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lowered if name in _PASSED or name.startswith(b"flwr-")]
