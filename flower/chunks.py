"""Messages in pieces, as Flower sends them: each piece is an object of its own, and is announced before all are there.

Flower's own download waits a second before it asks again for a piece that is not there yet, and for hours for one that never
comes. A message is measured before it is put together: arrays list their chunks by index and may repeat one, as an array of zeros
honestly does, so that a few kilobytes may stand for gigabytes.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)

_MAX_HEAD_BYTES = 4 * 2**20  # of all that is no chunk of an array: parsed, it takes many times as much memory


class TooLarge(Exception):
    """The message is larger than was expected."""


class Malformed(Exception):
    """What has arrived is no message."""


@dataclass(frozen=True)
class ChunkedMessage:
    """A message in its pieces.

    Attributes:
        number: The id of the message.
        pieces: Object id -> content, as it arrived.
    """

    number: str
    pieces: dict[str, bytes]

    def message(self, max_bytes: int) -> Message:
        """Put the message together. Once only: the pieces are used up, so that they are not held twice.

        Args:
            max_bytes: Of its arrays, in all.

        Raises:
            TooLarge: If its arrays would have more bytes; none is made then.
            Malformed: If it cannot be put together.
        """
        size = count_inflated_bytes(self.number, self.pieces)
        if size > max_bytes:
            raise TooLarge(f"its arrays would have {size:,} bytes, expected at most {max_bytes:,}")
        try:
            message = inflate_object_from_contents(self.number, self.pieces)
        except MemoryError:
            raise
        except Exception as error:  # what a stranger has sent may be wrong in any way
            raise Malformed(f"it cannot be put together from its parts ({type(error).__name__})") from None
        return _with_message_id(message, self.number)

    def header(self, *records: str) -> Message:
        """Return the message with some of its records of plain values, and without arrays. Raises TooLarge or Malformed."""
        count_inflated_bytes(self.number, self.pieces)
        try:
            _, children, _ = _read_object(self.pieces, self.number, "Message")
            held = {child: RecordDict(self._plain(child, records)) for child in children}
            message = Message.inflate(self.pieces[self.number], held)  # type: ignore[arg-type]
        except MemoryError:
            raise
        except Exception as error:
            raise Malformed(f"its header cannot be read ({type(error).__name__})") from None
        return _with_message_id(message, self.number)

    def _plain(self, held: str, names: tuple[str, ...]) -> dict[str, Any]:
        found = _read_names(self.pieces, held, "RecordDict")
        plain = {n: found[n] for n in names if n in found and _read_object(self.pieces, found[n])[0] == "ConfigRecord"}
        return {name: ConfigRecord.inflate(self.pieces[number]) for name, number in plain.items()}


def _with_message_id(message: object, number: str) -> Message:
    if not isinstance(message, Message):
        raise Malformed(f"it is of the kind {type(message).__name__}, expected a message")
    message.metadata.__dict__["_message_id"] = number  # not part of a message's own content
    return message


def count_inflated_bytes(number: str, pieces: Mapping[str, bytes]) -> int:
    """Return the bytes that the arrays of a message have once it is put together.

    Raises:
        TooLarge: If all else is larger than the limit.
        Malformed: If the pieces are not nested as those of a message.
    """
    heads = sum(len(content) for content in pieces.values() if not content.startswith(b"ArrayChunk "))
    if heads > _MAX_HEAD_BYTES:
        raise TooLarge(f"its headers have {heads:,} bytes, expected at most {_MAX_HEAD_BYTES:,}")
    try:
        return _count_message_bytes(pieces, number)
    except MemoryError:
        raise
    except Malformed:
        raise
    except Exception as error:  # what a stranger has sent may be wrong in any way
        raise Malformed(f"it cannot be put together from its parts ({type(error).__name__})") from None


def _count_message_bytes(pieces: Mapping[str, bytes], number: str) -> int:
    _, children, _ = _read_object(pieces, number, "Message")
    known: dict[str, int] = {}  # array -> bytes
    total = 0
    for records in children:
        for record, times in Counter(_read_names(pieces, records, "RecordDict").values()).items():
            total += times * _count_record_bytes(pieces, record, known)
    return total


def _count_record_bytes(pieces: Mapping[str, bytes], number: str, known: dict[str, int]) -> int:
    kind, children, _ = _read_object(pieces, number)
    if kind in ("ConfigRecord", "MetricRecord") and not children:
        return 0
    total = 0
    for array, times in Counter(_read_names(pieces, number, "ArrayRecord").values()).items():
        if array not in known:
            known[array] = _count_array_bytes(pieces, array)
        total += times * known[array]
    return total


def _count_array_bytes(pieces: Mapping[str, bytes], number: str) -> int:
    _, children, body = _read_object(pieces, number, "Array")
    sizes = [_count_chunk_bytes(pieces, child) for child in children]
    return sum(sizes[index] for index in _parse_body(body)["arraychunk_ids"])


def _parse_body(body: memoryview) -> Any:
    """Parse a body as JSON; refuse lone surrogates, which JSON can name and which no file or hash can hold."""
    found = json.loads(bytes(body))
    json.dumps(found, ensure_ascii=False).encode()
    return found


def _count_chunk_bytes(pieces: Mapping[str, bytes], number: str) -> int:
    _, children, body = _read_object(pieces, number, "ArrayChunk")
    if children:  # they would be put together first
        raise Malformed("a chunk of it holds other parts")
    return len(body)


def _read_names(pieces: Mapping[str, bytes], number: str, kind: str) -> dict[str, str]:
    """What a record holds, as name -> object id. All that its head lists is put together, so all of it must have a name."""
    _, children, body = _read_object(pieces, number, kind)
    named = _parse_body(body)
    if not isinstance(named, dict) or set(named.values()) != set(children):
        raise Malformed(f"a {kind} of it holds other parts than it names")
    return named


def _read_object(pieces: Mapping[str, bytes], number: str, expected: str = "") -> tuple[str, list[str], memoryview]:
    """Kind, children and body of a piece."""
    content = pieces[number]
    kind, children, _ = get_object_head_values_from_object_content(content)
    if expected and kind != expected:
        raise Malformed(f"a part of it is of the kind {kind[:40]}, expected {expected}")
    return kind, children, memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]


Pending = ObjectUnavailableError  # to be raised for a piece that may yet come

_MAX_CHUNKS = 100_000  # Flower cuts arrays into pieces of 5 MiB


@dataclass(frozen=True)
class PullLimits:
    """All in seconds. The defaults are those of every download; tests pass shorter ones.

    Attributes:
        retry_backoff: Before a piece that is not there is asked for again; doubled each time.
        max_retry_backoff: The same, at most.
        slow_call: A call under way for longer brings a piece: that there is none yet is said at once.
    """

    retry_backoff: float = 0.02
    max_retry_backoff: float = 0.5
    slow_call: float = 2.0


_PULL_LIMITS = PullLimits()


class Aborted(Exception):
    """The rest of the message is gone, or does not arrive."""


def download(
    tree: ObjectTree, pull: Callable[[str], bytes], max_bytes: int, silence: float, limits: PullLimits = _PULL_LIMITS
) -> Message:
    """Download a message and put it together; see `download_chunks`.

    Raises:
        TooLarge: Also if it would be larger than `max_bytes` once it is put together.
        Malformed: If it cannot be put together.
    """
    return download_chunks(tree, pull, max_bytes, silence, limits).message(max_bytes)


def download_chunks(
    tree: ObjectTree, pull: Callable[[str], bytes], max_bytes: int, silence: float, limits: PullLimits = _PULL_LIMITS
) -> ChunkedMessage:
    """Download all pieces of a message; never more than `max_bytes` and one piece.

    Args:
        tree: The ids of its pieces.
        pull: Downloads a piece by its id, from several threads. Raises Pending for one that may yet come.
        max_bytes: Of all pieces.
        silence: Seconds without a piece after which the rest is given up.
        limits: How long calls may take, and when they are made again.

    Raises:
        TooLarge: If it is larger.
        Aborted: If the rest is gone or does not arrive.
    """
    if sum(1 for _ in islice(iterate_object_tree(tree), _MAX_CHUNKS + 1)) > _MAX_CHUNKS:
        raise TooLarge(f"it has more than {_MAX_CHUNKS:,} parts, the most that were expected")
    try:
        found = pull_objects(
            [part.object_id for part in iterate_object_tree(tree)],
            _Bounded(pull, max_bytes, silence, limits.slow_call),
            max_time=None,
            max_tries_per_object=None,
            initial_backoff=limits.retry_backoff,
            backoff_cap=limits.max_retry_backoff,
        )
    except ObjectPullError as error:
        raise Aborted(f"a part of it is gone ({error})") from None
    return ChunkedMessage(tree.object_id, found)


class _Bounded:
    """Pulls pieces up to so many bytes, and so many seconds without one."""

    def __init__(self, pull: Callable[[str], bytes], max_bytes: int, silence: float, slow_call: float) -> None:
        self._pull = pull
        self._most_bytes = max_bytes
        self._silence = silence
        self._slow_call = slow_call
        self._taken = 0
        self._last_chunk_at = time.monotonic()
        self._lock = threading.Lock()
        self._calls: dict[int, float] = {}  # thread -> when its call began

    def __call__(self, number: str) -> bytes:
        self._calls[threading.get_ident()] = time.monotonic()
        try:
            content = self._pull(number)
        except Pending:
            if self._is_idle():
                raise Aborted(f"no part of it has come for {self._silence:g} seconds") from None
            raise
        finally:
            del self._calls[threading.get_ident()]
        with self._lock:
            self._taken += len(content)
            self._last_chunk_at = time.monotonic()
            if self._taken > self._most_bytes:
                raise TooLarge(f"it has more than {self._most_bytes:,} bytes, the most that were expected")
        return content

    def _is_idle(self) -> bool:
        """Whether nothing arrives any more. On a slow line a call under way may take longer than that."""
        now = time.monotonic()
        ours = threading.get_ident()
        slow = any(now - began > self._slow_call for thread, began in list(self._calls.items()) if thread != ours)
        return not slow and now - self._last_chunk_at > self._silence


def pull_reply(grid: Grid, number: str) -> Message | None:
    """Return the reply to a message; None where it is not there yet."""
    for reply in grid.pull_messages([number]):
        return reply
    return None
