"""The coordinate-wise median."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.strategies.order_statistics import fuse_coordinates, median_rows
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import Delta, WeightedUpdate


@fusion(
    "median",
    cite="Yin et al., ICML 2018, https://arxiv.org/abs/1803.01498, definition 1",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False),
)
def median(updates: Sequence[WeightedUpdate]) -> Delta:
    """Take the median of Δ_1j … Δ_nj in every coordinate j; the mean of the middle two if n is even."""
    return fuse_coordinates([update.entries for update in updates], lambda rows, _: median_rows(rows))
