"""Limits of what a node takes from a server: no redirects, no compressed answers, and no answer larger than it can hold."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

_MAX_RESPONSE_BYTES = 64 * 2**20  # of one answer: a piece of an array, a bundle, or the names of all objects of a message


def harden_http_client(calls: httpx.Client) -> None:
    """Protect a client of a server that is not trusted.

    The server may not redirect calls to another place, such as one inside the organization's network, nor fill the memory.
    Compressed answers are refused: a small one may be endless.
    """
    calls.follow_redirects = False
    calls.headers["accept-encoding"] = "identity"
    calls.event_hooks = {"response": [_limit_response]}


def _limit_response(response: httpx.Response) -> None:
    """Limit an answer, of which only the head was read."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx.RemoteProtocolError("its answer is compressed: expected a server that does as it is asked")
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _LimitedStream(response.stream)


class _LimitedStream(httpx.SyncByteStream):
    """The content of an answer, up to the limit."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        for piece in self._stream:
            taken += len(piece)
            if taken > _MAX_RESPONSE_BYTES:
                raise httpx.RemoteProtocolError(f"its answer has more than {_MAX_RESPONSE_BYTES:,} bytes: expected a smaller one")
            yield piece

    def close(self) -> None:
        self._stream.close()
