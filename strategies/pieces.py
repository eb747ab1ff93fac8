"""A message that arrives in pieces, as Flower sends it: each an object of its own, and announced before it is all there.

Flower's own way waits a second before it asks again for a piece that is not there yet, and for hours for one that never comes.
All of Flower's internals that both sides need are in this file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import islice

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    pull_objects,
)

from cotune.strategies.parcel import Parcel, TooMuch

NotThere = ObjectUnavailableError  # to be raised for a piece that may yet come

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.02, 0.5  # before a piece that is not there is asked for again
_SLOW_SECONDS = 2.0  # a call under way for longer brings a piece: that there is none yet is said at once
_MOST_PIECES = 100_000  # Flower cuts arrays into pieces of 5 MiB


class CutOff(Exception):
    """The rest of the message is gone, or does not come."""


def gather(tree: ObjectTree, pull: Callable[[str], bytes], most_bytes: int, silence: float) -> Message:
    """The message, with its number; otherwise as `collect`.

    Raises TooMuch also where it would be larger than `most_bytes` once it is put together, before that is done; Malformed.
    """
    return collect(tree, pull, most_bytes, silence).message(most_bytes)


def collect(tree: ObjectTree, pull: Callable[[str], bytes], most_bytes: int, silence: float) -> Parcel:
    """All pieces of a message. No more than `most_bytes` and a piece are ever taken.

    tree: its pieces. pull: of a piece's id, called from several threads. silence: seconds without any piece that are waited for.
    Raises TooMuch, CutOff, and what `pull` raises.
    """
    if sum(1 for _ in islice(iterate_object_tree(tree), _MOST_PIECES + 1)) > _MOST_PIECES:
        raise TooMuch(f"it has more than {_MOST_PIECES:,} parts, the most that were expected")
    try:
        found = pull_objects(
            [part.object_id for part in iterate_object_tree(tree)],
            _Bounded(pull, most_bytes, silence),
            max_time=None,
            max_tries_per_object=None,
            initial_backoff=_FIRST_WAIT_SECONDS,
            backoff_cap=_LONGEST_WAIT_SECONDS,
        )
    except ObjectPullError as error:
        raise CutOff(f"a part of it is gone ({error})") from None
    return Parcel(tree.object_id, found)


class _Bounded:
    """The same, up to so many bytes, and so many seconds without one."""

    def __init__(self, pull: Callable[[str], bytes], most_bytes: int, silence: float) -> None:
        self._pull, self._most_bytes, self._silence = pull, most_bytes, silence
        self._taken, self._came, self._lock = 0, time.monotonic(), threading.Lock()
        self._under_way: dict[int, float] = {}  # thread -> when its call began

    def __call__(self, number: str) -> bytes:
        self._under_way[threading.get_ident()] = time.monotonic()
        try:
            content = self._pull(number)
        except NotThere:
            if self._is_silent():
                raise CutOff(f"no part of it has come for {self._silence:g} seconds") from None
            raise
        finally:
            del self._under_way[threading.get_ident()]
        with self._lock:
            self._taken += len(content)
            self._came = time.monotonic()
            if self._taken > self._most_bytes:
                raise TooMuch(f"it has more than {self._most_bytes:,} bytes, the most that were expected")
        return content

    def _is_silent(self) -> bool:
        """On a slow line one part takes longer than the others may be late."""
        now, ours = time.monotonic(), threading.get_ident()
        slow = any(now - began > _SLOW_SECONDS for thread, began in list(self._under_way.items()) if thread != ours)
        return not slow and now - self._came > self._silence
