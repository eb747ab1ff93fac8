"""How far a node goes along with a server's answers: no further than the call that it made, and no more than it can hold."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

_MOST_ANSWER_BYTES = 64 * 2**20  # of one answer: a piece of an array, a bundle, or the names of all objects of a message


def harden_http_client(calls: httpx.Client) -> None:
    """A server may not send the node's calls on to another place, inside the organization's network for one, nor fill its memory.

    Compressed answers are not taken: a small one may be endless.
    """
    calls.follow_redirects = False
    calls.headers["accept-encoding"] = "identity"
    calls.event_hooks = {"response": [_bound]}


def _bound(response: httpx.Response) -> None:
    """Called before anything of the answer but its head was read."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx.RemoteProtocolError("its answer is compressed: expected a server that does as it is asked")
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Bounded(response.stream)


class _Bounded(httpx.SyncByteStream):
    """The content of an answer, up to the limit."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        for piece in self._stream:
            taken += len(piece)
            if taken > _MOST_ANSWER_BYTES:
                raise httpx.RemoteProtocolError(f"its answer has more than {_MOST_ANSWER_BYTES:,} bytes: expected a smaller one")
            yield piece

    def close(self) -> None:
        self._stream.close()
