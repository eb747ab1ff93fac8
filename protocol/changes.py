"""Changes of the shared state: what a request holds in place of the whole where its recipient has an earlier version of it.

With a plan's `wire_down`, the state after a round is what organizations can rebuild to the bit: the state before it plus a change
that was rounded to the codec. A request names the versions that it can build on, and the one that it builds, by their digests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from cotune.errors import RunError
from cotune.plan.wire import Codec
from cotune.protocol.arrays import ARRAY_HEAD, count_written

MAX_CHANGES = 16  # of a request
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class RoundChange:
    """What a round has changed of the state.

    Attributes:
        round: Its number.
        start: `messages.state_digest` of the state that organizations received in the round.
        names: Of all parameters in that state.
        values: Parameter -> difference, in values of the codec; those that it lacks are unchanged.
    """

    round: int
    start: str
    names: frozenset[str]
    values: Mapping[str, Tensor]


def name_of_change(round: int) -> str:
    """Return the name of the record with what a round has changed."""
    return f"change-{round}"


def join_versions(digests: Iterable[str]) -> str:
    """Return digests of versions as the header of a request holds them, the oldest first."""
    return " ".join(digests)


def split_versions(text: str, round: int) -> tuple[str, ...]:
    """Return the digests of a header: of the versions before each change, and of the one after the last; empty: none.

    Raises:
        RunError: If they are malformed, or more than the rounds before this one and the limit allow.
    """
    found = tuple(text.split(" ")) if text else ()
    if found and (len(found) - 1 > min(MAX_CHANGES, round - 1) or not all(map(_DIGEST.fullmatch, found))):
        raise RunError(
            f"the header of a request has versions = {text!r:.60}: expected at most {MAX_CHANGES + 1} digests, one more than"
            " changes, and no more changes than earlier rounds",
            code="run.malformed_message",
        )
    return found


def count_cost(tensors: Mapping[str, Tensor], codec: Codec) -> int:
    """Return the bytes by which whole states and changes are compared: of names and values, and of a head for each array."""
    return sum(len(name.encode()) + count_written(codec, tuple(t.shape)) + ARRAY_HEAD for name, t in tensors.items())


def add_change(state: Mapping[str, Tensor], change: Mapping[str, Tensor], whole: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return a state after a change, computed in float32: the same bits on both sides.

    Args:
        state: Parameter -> value.
        change: Parameter -> difference.
        whole: Parameters whose changes do not count, as their last value is given as it is.

    Raises:
        ValueError: If a changed parameter is not in the state, or has another shape.
    """
    moved = dict(state)
    for name in change.keys() - set(whole):
        if name not in state or state[name].shape != change[name].shape:
            raise ValueError(f"there is no {name[:80]} of shape {tuple(change[name].shape)} to change")
        if bool(change[name].any()):  # zeros, as of a round that was not applied, leave −0 what it is
            moved[name] = state[name] + change[name]
    return moved
