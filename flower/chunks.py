"""A message that arrives in pieces, as Flower sends it: each an object of its own, and announced before it is all there.

Flower's own way waits a second before it asks again for a piece that is not there yet, and for hours for one that never comes.
All of Flower's internals that both sides need are in this file.

A message in its pieces, measured before it is put together: Flower's arrays list their chunks by index, and may repeat one.

An array of zeros is honestly sent as one chunk, listed many times. So a few kilobytes may stand for gigabytes, and only anyone
who
knows what the message is for can say how large it may become. Flower's format of pieces is known to this file alone.
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

_MOST_HEAD_BYTES = 4 * 2**20  # of all that is no chunk of an array: parsed, it takes many times as much memory


class TooLarge(Exception):
    """The message is larger than it may be."""


class Malformed(Exception):
    """What has come is no message."""


@dataclass(frozen=True)
class ChunkedMessage:
    """number: of the message. pieces: object id -> content, as it came."""

    number: str
    pieces: dict[str, bytes]

    def message(self, max_bytes: int) -> Message:
        """The message, with its number. It can be asked for once: the pieces are used up, so that they are not held twice.

        Raises TooMuch where its arrays would have more bytes in all than `max_bytes`, before one of them is made; Malformed.
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
        return _numbered(message, self.number)

    def header(self, *records: str) -> Message:
        """The message with some of its records, of plain values, and with no array. Raises TooMuch, Malformed."""
        count_inflated_bytes(self.number, self.pieces)
        try:
            _, children, _ = _opened(self.pieces, self.number, "Message")
            held = {child: RecordDict(self._plain(child, records)) for child in children}
            message = Message.inflate(self.pieces[self.number], held)  # type: ignore[arg-type]
        except MemoryError:
            raise
        except Exception as error:
            raise Malformed(f"its header cannot be read ({type(error).__name__})") from None
        return _numbered(message, self.number)

    def _plain(self, held: str, names: tuple[str, ...]) -> dict[str, Any]:
        found = _named(self.pieces, held, "RecordDict")
        plain = {n: found[n] for n in names if n in found and _opened(self.pieces, found[n])[0] == "ConfigRecord"}
        return {name: ConfigRecord.inflate(self.pieces[number]) for name, number in plain.items()}


def _numbered(message: object, number: str) -> Message:
    if not isinstance(message, Message):
        raise Malformed(f"it is of the kind {type(message).__name__}, expected a message")
    message.metadata.__dict__["_message_id"] = number  # not part of a message's own content
    return message


def count_inflated_bytes(number: str, pieces: Mapping[str, bytes]) -> int:
    """How many bytes the arrays of a message have once it is put together, by whatever names they are known.

    Raises TooMuch where all else is more than the limit, Malformed where the pieces are not nested as a message's are.
    """
    heads = sum(len(content) for content in pieces.values() if not content.startswith(b"ArrayChunk "))
    if heads > _MOST_HEAD_BYTES:
        raise TooLarge(f"its headers have {heads:,} bytes, expected at most {_MOST_HEAD_BYTES:,}")
    try:
        return _of_message(pieces, number)
    except MemoryError:
        raise
    except Malformed:
        raise
    except Exception as error:  # what a stranger has sent may be wrong in any way
        raise Malformed(f"it cannot be put together from its parts ({type(error).__name__})") from None


def _of_message(pieces: Mapping[str, bytes], number: str) -> int:
    _, children, _ = _opened(pieces, number, "Message")
    known: dict[str, int] = {}  # array -> bytes
    total = 0
    for records in children:
        for record, times in Counter(_named(pieces, records, "RecordDict").values()).items():
            total += times * _of_record(pieces, record, known)
    return total


def _of_record(pieces: Mapping[str, bytes], number: str, known: dict[str, int]) -> int:
    kind, children, _ = _opened(pieces, number)
    if kind in ("ConfigRecord", "MetricRecord") and not children:
        return 0
    total = 0
    for array, times in Counter(_named(pieces, number, "ArrayRecord").values()).items():
        if array not in known:
            known[array] = _of_array(pieces, array)
        total += times * known[array]
    return total


def _of_array(pieces: Mapping[str, bytes], number: str) -> int:
    _, children, body = _opened(pieces, number, "Array")
    sizes = [_of_chunk(pieces, child) for child in children]
    return sum(sizes[index] for index in _written(body)["arraychunk_ids"])


def _written(body: memoryview) -> Any:
    """A body that is JSON, in letters: JSON may name half a character, of which there is no hash and no file."""
    found = json.loads(bytes(body))
    json.dumps(found, ensure_ascii=False).encode()
    return found


def _of_chunk(pieces: Mapping[str, bytes], number: str) -> int:
    _, children, body = _opened(pieces, number, "ArrayChunk")
    if children:  # they would be put together first
        raise Malformed("a chunk of it holds other parts")
    return len(body)


def _named(pieces: Mapping[str, bytes], number: str, kind: str) -> dict[str, str]:
    """What a record holds: name -> object id. All that its head lists is put together, so all of it must have a name."""
    _, children, body = _opened(pieces, number, kind)
    named = _written(body)
    if not isinstance(named, dict) or set(named.values()) != set(children):
        raise Malformed(f"a {kind} of it holds other parts than it names")
    return named


def _opened(pieces: Mapping[str, bytes], number: str, expected: str = "") -> tuple[str, list[str], memoryview]:
    """Kind, children and body of a piece."""
    content = pieces[number]
    kind, children, _ = get_object_head_values_from_object_content(content)
    if expected and kind != expected:
        raise Malformed(f"a part of it is of the kind {kind[:40]}, expected {expected}")
    return kind, children, memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]


Pending = ObjectUnavailableError  # to be raised for a piece that may yet come

# before a piece that is not there is asked for again
_FIRST_WAIT_SECONDS = 0.02
_LONGEST_WAIT_SECONDS = 0.5
_SLOW_SECONDS = 2.0  # a call under way for longer brings a piece: that there is none yet is said at once
_MOST_PIECES = 100_000  # Flower cuts arrays into pieces of 5 MiB


class Aborted(Exception):
    """The rest of the message is gone, or does not come."""


def download(tree: ObjectTree, pull: Callable[[str], bytes], max_bytes: int, silence: float) -> Message:
    """The message, with its number; otherwise as `download_chunks`.

    Raises TooMuch also where it would be larger than `max_bytes` once it is put together, before that is done; Malformed.
    """
    return download_chunks(tree, pull, max_bytes, silence).message(max_bytes)


def download_chunks(tree: ObjectTree, pull: Callable[[str], bytes], max_bytes: int, silence: float) -> ChunkedMessage:
    """All pieces of a message. No more than `max_bytes` and a piece are ever taken.

    tree: its pieces. pull: of a piece's id, called from several threads. silence: seconds without any piece that are waited for.
    Raises TooMuch, CutOff, and what `pull` raises.
    """
    if sum(1 for _ in islice(iterate_object_tree(tree), _MOST_PIECES + 1)) > _MOST_PIECES:
        raise TooLarge(f"it has more than {_MOST_PIECES:,} parts, the most that were expected")
    try:
        found = pull_objects(
            [part.object_id for part in iterate_object_tree(tree)],
            _Bounded(pull, max_bytes, silence),
            max_time=None,
            max_tries_per_object=None,
            initial_backoff=_FIRST_WAIT_SECONDS,
            backoff_cap=_LONGEST_WAIT_SECONDS,
        )
    except ObjectPullError as error:
        raise Aborted(f"a part of it is gone ({error})") from None
    return ChunkedMessage(tree.object_id, found)


class _Bounded:
    """The same, up to so many bytes, and so many seconds without one."""

    def __init__(self, pull: Callable[[str], bytes], max_bytes: int, silence: float) -> None:
        self._pull = pull
        self._most_bytes = max_bytes
        self._silence = silence
        self._taken = 0
        self._came = time.monotonic()
        self._lock = threading.Lock()
        self._under_way: dict[int, float] = {}  # thread -> when its call began

    def __call__(self, number: str) -> bytes:
        self._under_way[threading.get_ident()] = time.monotonic()
        try:
            content = self._pull(number)
        except Pending:
            if self._is_silent():
                raise Aborted(f"no part of it has come for {self._silence:g} seconds") from None
            raise
        finally:
            del self._under_way[threading.get_ident()]
        with self._lock:
            self._taken += len(content)
            self._came = time.monotonic()
            if self._taken > self._most_bytes:
                raise TooLarge(f"it has more than {self._most_bytes:,} bytes, the most that were expected")
        return content

    def _is_silent(self) -> bool:
        """On a slow line one part takes longer than the others may be late."""
        now = time.monotonic()
        ours = threading.get_ident()
        slow = any(now - began > _SLOW_SECONDS for thread, began in list(self._under_way.items()) if thread != ours)
        return not slow and now - self._came > self._silence


def pull_reply(grid: Grid, number: str) -> Message | None:
    """The answer to a message, if it is there."""
    for reply in grid.pull_messages([number]):
        return reply
    return None
