"""The mean of every coordinate without its extremes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cotune.strategies.blocks import Entries
from cotune.strategies.order_statistics import fuse_coordinates, mean_rows, sort_rows
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import Delta, WeightedUpdate

_ROUNDING = 1e-9  # of β·n: a tenth of ten is one


@fusion(
    "trimmed_mean",
    cite="Yin et al., ICML 2018, https://arxiv.org/abs/1803.01498, definition 2",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False),
    min_updates=lambda fraction: math.ceil(1 / fraction - _ROUNDING),
)
def trimmed_mean(updates: Sequence[WeightedUpdate], *, fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2) -> Delta:
    """D_j = the mean of Δ_1j … Δ_nj without the ⌊βn⌋ largest and the ⌊βn⌋ smallest, for every coordinate j.

    fraction: β, cut off at either end. A round of fewer than 1/β updates is refused, as nothing would be.
    """

    def trimmed(rows: Entries, _: Sequence[int]) -> Entries:
        cut = math.floor(fraction * len(rows) + _ROUNDING)
        return mean_rows(sort_rows(rows)[cut : len(rows) - cut])

    return fuse_coordinates([update.entries for update in updates], trimmed)
