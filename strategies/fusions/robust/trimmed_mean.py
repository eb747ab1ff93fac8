"""The coordinate-wise trimmed mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cotune.strategies.order_statistics import fuse_coordinates, mean_rows, sort_rows
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.tensor_blocks import Entries
from cotune.strategies.types import Delta, WeightedUpdate

_ROUNDING = 1e-9  # added to β·n before it is rounded down, as 0.1 · 10 should give 1


@fusion(
    "trimmed_mean",
    cite="Yin et al., ICML 2018, https://arxiv.org/abs/1803.01498, definition 2",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False),
    min_updates=lambda fraction: math.ceil(1 / fraction - _ROUNDING),
)
def trimmed_mean(updates: Sequence[WeightedUpdate], *, fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2) -> Delta:
    """Average Δ_1j … Δ_nj in every coordinate j without the ⌊βn⌋ largest and the ⌊βn⌋ smallest values.

    Args:
        updates: Their weights are not used.
        fraction: β, trimmed at either end. A round needs at least 1/β updates, as nothing would be trimmed of fewer.
    """

    def trimmed(rows: Entries, _: Sequence[int]) -> Entries:
        cut = math.floor(fraction * len(rows) + _ROUNDING)
        return mean_rows(sort_rows(rows)[cut : len(rows) - cut])

    return fuse_coordinates([update.entries for update in updates], trimmed)
