"""Schedules of the learning rate over the rounds, for server optimizers and for local training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

if TYPE_CHECKING:
    from cotune.strategies.types import RoundContext


Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
Warmup = Annotated[int, Field(ge=0)]  # rounds in which the rate grows to its full value


def compute_rate(lr: float, schedule: Schedule, warmup: int, context: RoundContext) -> float:
    """Return the learning rate of a round, which is above 0.

    In round t ≤ warmup it is lr · t / warmup, then lr · decay(schedule, t − warmup − 1, rounds − warmup).

    Args:
        lr: The full rate.
        schedule: How the rate changes after the warm-up.
        warmup: Rounds in which the rate grows to lr.
        context: For the round's number and the number of rounds.
    """
    if context.round <= warmup:
        return lr * context.round / warmup
    done = context.round - warmup - 1
    return lr * decay(schedule, done, max(1, context.rounds - warmup))


def decay(schedule: Schedule, done: int, rounds: int) -> float:
    """Return the factor of a learning rate after some of its rounds.

    It is 1 (constant), 1 − done/rounds (linear), (1 + cos(π·done/rounds))/2 (cosine) or 1/√(done + 1) (inverse_sqrt).

    Args:
        schedule: Name of the formula.
        done: Rounds that are over.
        rounds: Their total number; the factor is above 0 for done < rounds.
    """
    match schedule:
        case "linear":
            return 1 - done / rounds
        case "cosine":
            return (1 + math.cos(math.pi * done / rounds)) / 2
        case "inverse_sqrt":
            return 1 / math.sqrt(done + 1)
    return 1.0
