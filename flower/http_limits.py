"""Limit what a node accepts from a server: no redirects, no compressed answers, and no answer above a size."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

_MAX_RESPONSE_BYTES = 64 * 2**20  # of one answer: a chunk of an array, a bundle, or the ids of all objects of a message


def harden_http_client(calls: httpx.Client) -> None:
    """Protect an HTTP client against an untrusted server.

    The server can neither redirect calls, for example into the organization's own network, nor exhaust the memory. Compressed
    answers are refused, as a small one may expand without limit.
    """
    calls.follow_redirects = False
    calls.headers["accept-encoding"] = "identity"
    calls.event_hooks = {"response": [_limit_response]}


def _limit_response(response: httpx.Response) -> None:
    """Limit an answer whose content is not read yet."""
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
        """Close the underlying stream."""
        self._stream.close()
