"""How a learning rate goes with the rounds: a server optimizer's, and that of local training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

if TYPE_CHECKING:
    from cotune.strategies.types import RoundContext


Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
Warmup = Annotated[int, Field(ge=0)]  # rounds in which the rate grows to its full value


def compute_rate(lr: float, schedule: Schedule, warmup: int, context: RoundContext) -> float:
    """The rate of a round: lr·t/warmup in the rounds t ≤ warmup, then, with s = t − warmup − 1 of S = rounds − warmup, lr times
    `decay(schedule, s, S)`. It is above 0 in every round.
    """
    if context.round <= warmup:
        return lr * context.round / warmup
    done = context.round - warmup - 1
    return lr * decay(schedule, done, max(1, context.rounds - warmup))


def decay(schedule: Schedule, done: int, rounds: int) -> float:
    """Return the fraction of its full value that a rate has after `done` of `rounds` rounds, above 0 for done < rounds.

    1 (constant), 1 − done/rounds (linear), (1 + cos(π·done/rounds))/2 (cosine) or 1/√(done + 1) (inverse_sqrt).
    """
    match schedule:
        case "linear":
            return 1 - done / rounds
        case "cosine":
            return (1 + math.cos(math.pi * done / rounds)) / 2
        case "inverse_sqrt":
            return 1 / math.sqrt(done + 1)
    return 1.0
