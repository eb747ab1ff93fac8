"""How a server optimiser's learning rate goes with the rounds."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from cotune.strategies.round import RoundContext

__all__ = ["Schedule", "Warmup", "rate_of"]

Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
Warmup = Annotated[int, Field(ge=0)]  # rounds in which the rate grows to its full value


def rate_of(lr: float, schedule: Schedule, warmup: int, context: RoundContext) -> float:
    """The rate of a round: lr·t/warmup in the rounds t ≤ warmup, then, with s = t − warmup − 1 of S = rounds − warmup, lr times
    1 (constant), 1 − s/S (linear), (1 + cos(πs/S))/2 (cosine) or 1/√(s + 1) (inverse_sqrt). It is above 0 in every round.
    """
    if context.round <= warmup:
        return lr * context.round / warmup
    done, whole = context.round - warmup - 1, max(1, context.rounds - warmup)
    match schedule:
        case "linear":
            return lr * (1 - done / whole)
        case "cosine":
            return lr * (1 + math.cos(math.pi * done / whole)) / 2
        case "inverse_sqrt":
            return lr / math.sqrt(done + 1)
    return lr
