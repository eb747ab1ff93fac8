"""The median of every coordinate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cotune.strategies.fusions.robust_ops import stacked
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import Delta, WeightedUpdate


@fusion(
    "median",
    cite="Yin et al., ICML 2018, https://arxiv.org/abs/1803.01498, definition 1",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False),
)
def median(updates: Sequence[WeightedUpdate]) -> Delta:
    """D_j = the median of Δ_1j … Δ_nj, for every coordinate j; the mean of the middle two where n is even."""
    return {name: middle(deltas) for name, deltas in stacked(updates).items()}


def middle(deltas: Tensor) -> Tensor:
    """The median over the first dimension, n × shape -> shape. torch's own takes the lower of the middle two."""
    ordered = deltas.sort(dim=0).values
    return (ordered[(len(deltas) - 1) // 2] + ordered[len(deltas) // 2]) / 2
