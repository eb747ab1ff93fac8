"""Check the head of a request: only calls of Flower's Fleet API pass from the public port to the SuperLink.

The SuperLink serves its Fleet, Control and Runtime APIs on one port, and the Control API requires no authentication.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import h11

from cotune.server.proxy.limits import Limits


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


_FLEET_PATH = re.compile(rb"/v1/fleet/([a-z]+(?:-[a-z]+)*)")  # no query, escapes or dots: two parsers might read them differently
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
