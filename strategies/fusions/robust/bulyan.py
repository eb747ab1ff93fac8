"""Krum against who is far away, then the middle of every coordinate against who hides in a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from cotune.strategies.fusions.robust.robust_ops import (
    compute_squared_distances,
    coordinate_median,
    rank_by_krum_score,
    stack_deltas,
)
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import Delta, WeightedUpdate


@fusion(
    "bulyan",
    cite="El Mhamdi et al., ICML 2018, https://arxiv.org/abs/1802.07927",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False),
    min_updates=lambda malicious: 4 * malicious + 3,
)
def bulyan(updates: Sequence[WeightedUpdate], *, malicious: Annotated[int, Field(ge=0)] = 1) -> Delta:
    """D_j = the mean of the n − 4f values nearest to the median, among n − 2f updates that Krum chooses one by one.

    Whom Krum has chosen is no neighbor any more of those that are left.

    malicious: f, how many of the n updates may be; n ≥ 4f + 3.
    """
    chosen = _chosen(compute_squared_distances(updates), malicious)
    return {name: _around_middle(deltas, 2 * malicious) for name, deltas in stack_deltas([updates[k] for k in chosen]).items()}


def _chosen(distances: Tensor, malicious: int) -> list[int]:
    """The n − 2f updates that Krum takes, one after the other."""
    left = list(range(len(distances)))
    chosen = list[int]()
    while len(chosen) < len(distances) - 2 * malicious:
        chosen.append(left.pop(rank_by_krum_score(distances[left][:, left], malicious)[0]))
    return chosen


def _around_middle(deltas: Tensor, without: int) -> Tensor:
    """The mean over the first dimension of all but the `without` values that are farthest from the median."""
    ordered = deltas.sort(dim=0).values  # of two that are as far, the smaller stays
    nearest = (ordered - coordinate_median(deltas)).abs().argsort(dim=0, stable=True)[: len(deltas) - without]
    return ordered.gather(0, nearest).mean(dim=0)
