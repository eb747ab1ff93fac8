"""Exponentially tilted weights: between the mean over all records and the organization with the highest loss."""

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
    """Tilt the weights by the loss: w_k ∝ n_k e^(t·F_k), F_k the mean loss of the received model on the organization's records.

    The largest exponent is subtracted from all, so that none overflows. The server cannot verify the loss that an organization
    reports.

    Args:
        t: Per nat. Above 0, a high loss counts more; below 0, less; 0 weights by number of records.
    """
    exponents = [t * update.disclosures["loss"] for update in updates]
    largest = max(exponents, default=0.0)
    return [update.examples * math.exp(e - largest) for update, e in zip(updates, exponents, strict=True)]
