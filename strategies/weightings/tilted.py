"""Exponentially tilted weights: between everybody's mean and the worst served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cotune.strategies.registry import Needs, weighting
from cotune.strategies.types import Update


@weighting(
    "tilted",
    cite="Li, Beirami, Sanjabi & Smith, ICLR 2021, https://arxiv.org/abs/2007.01162 (TERM)",
    needs=Needs(sends=("loss",)),
)
def tilted(updates: Sequence[Update], *, t: Annotated[float, Field(ge=-100, le=100)] = 1.0) -> list[float]:
    """w_k ∝ n_k e^(t·F_k), F_k being the mean loss of the received model on the organization's records.

    t: per nat; above 0, who is served badly counts more; below 0, less; 0 counts by records. The largest exponent is subtracted
    from all, so that none overflows. A loss is believed as it is told.
    """
    exponents = [t * update.disclosures["loss"] for update in updates]
    largest = max(exponents, default=0.0)
    return [update.examples * math.exp(e - largest) for update, e in zip(updates, exponents, strict=True)]
