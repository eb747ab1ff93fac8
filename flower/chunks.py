"""Download and assemble messages in pieces, as Flower sends them: each piece is an object, announced before all are uploaded.

Flower's own download waits a second before it asks again for a piece that is not uploaded yet, and hours for one that never
arrives. The size of a message is computed before it is assembled: arrays list their chunks by index and may repeat one, as an
array of zeros legitimately does, so that a few kilobytes may expand to gigabytes.
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

_MAX_HEAD_BYTES = 4 * 2**20  # of everything but chunks of arrays; parsed, it takes many times as much memory


class TooLarge(Exception):
    """The message is larger than allowed."""


class Malformed(Exception):
    """The pieces do not form a message."""


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
        """Assemble the message. The pieces are consumed, so that they are not in memory twice; call it only once.

        Args:
            max_bytes: Limit of the total size of its arrays.

        Raises:
            TooLarge: If its arrays would be larger; nothing is assembled then.
            Malformed: If it cannot be assembled.
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
        """Return the message without arrays.

        Args:
            *records: Names of the records of plain values to include.

        Raises:
            TooLarge: If its headers are larger than the limit.
            Malformed: If it cannot be assembled.
        """
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
    """Return the size in bytes of a message's arrays once it is assembled.

    Args:
        number: Object id of the message.
        pieces: Object id -> content.

    Raises:
        TooLarge: If everything but the arrays is larger than the limit.
        Malformed: If the pieces are not nested like those of a message.
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
    if children:  # Flower would assemble them first
        raise Malformed("a chunk of it holds other parts")
    return len(body)


def _read_names(pieces: Mapping[str, bytes], number: str, kind: str) -> dict[str, str]:
    """Return a record's content as name -> object id. Flower assembles all listed children, so each must have a name."""
    _, children, body = _read_object(pieces, number, kind)
    named = _parse_body(body)
    if not isinstance(named, dict) or set(named.values()) != set(children):
        raise Malformed(f"a {kind} of it holds other parts than it names")
    return named


def _read_object(pieces: Mapping[str, bytes], number: str, expected: str = "") -> tuple[str, list[str], memoryview]:
    """Return kind, children and body of a piece."""
    content = pieces[number]
    kind, children, _ = get_object_head_values_from_object_content(content)
    if expected and kind != expected:
        raise Malformed(f"a part of it is of the kind {kind[:40]}, expected {expected}")
    return kind, children, memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]


Pending = ObjectUnavailableError  # raised for a piece that is not uploaded yet

_MAX_CHUNKS = 100_000  # Flower splits arrays into pieces of 5 MiB


@dataclass(frozen=True)
class PullLimits:
    """Times in seconds. The defaults apply to every download; tests pass shorter ones.

    Attributes:
        retry_backoff: Time before a missing piece is requested again; doubled each time.
        max_retry_backoff: Upper limit of `retry_backoff`.
        slow_call: A call that takes longer is transferring a piece, as a missing piece is reported at once.
    """

    retry_backoff: float = 0.02
    max_retry_backoff: float = 0.5
    slow_call: float = 2.0


_PULL_LIMITS = PullLimits()


class Aborted(Exception):
    """The rest of the message was deleted, or does not arrive."""


def download(
    tree: ObjectTree, pull: Callable[[str], bytes], max_bytes: int, silence: float, limits: PullLimits = _PULL_LIMITS
) -> Message:
    """Download a message and assemble it.

    Args:
        tree: See `download_chunks`, as for all arguments.
        pull: Downloads a piece by its id.
        max_bytes: Limit of the size of all pieces, and of the assembled arrays.
        silence: Seconds without a piece after which the download is given up.
        limits: Intervals of retries.

    Raises:
        TooLarge: If the pieces or the assembled arrays are larger than `max_bytes`.
        Aborted: If the rest was deleted or does not arrive.
        Malformed: If it cannot be assembled.
    """
    return download_chunks(tree, pull, max_bytes, silence, limits).message(max_bytes)


def download_chunks(
    tree: ObjectTree, pull: Callable[[str], bytes], max_bytes: int, silence: float, limits: PullLimits = _PULL_LIMITS
) -> ChunkedMessage:
    """Download all pieces of a message, never more than `max_bytes` and one piece.

    Args:
        tree: The ids of its pieces.
        pull: Downloads a piece by its id, from several threads; raises Pending if the piece is not uploaded yet.
        max_bytes: Limit of the total size.
        silence: Seconds without a piece after which the download is given up.
        limits: Intervals of retries.

    Raises:
        TooLarge: If it is larger.
        Aborted: If the rest was deleted or does not arrive.
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
    """Pulls pieces up to a number of bytes, and up to a number of seconds without a piece."""

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
        """Return whether nothing has arrived for too long. On a slow line, a call in progress may take longer than that."""
        now = time.monotonic()
        ours = threading.get_ident()
        slow = any(now - began > self._slow_call for thread, began in list(self._calls.items()) if thread != ours)
        return not slow and now - self._last_chunk_at > self._silence


def pull_reply(grid: Grid, number: str) -> Message | None:
    """Return the reply to a message; None if there is none yet."""
    for reply in grid.pull_messages([number]):
        return reply
    return None
