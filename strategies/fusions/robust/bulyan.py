"""Krum against who is far away, then the middle of every coordinate against who hides in a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from cotune.strategies.blocks import Entries
from cotune.strategies.fusions.robust.robust_ops import compute_squared_distances, rank_by_krum_score
from cotune.strategies.order_statistics import fuse_coordinates, mean_rows, sort_rows
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
    return fuse_coordinates([updates[k].entries for k in chosen], lambda rows, _: _around_middle(rows, 2 * malicious))


def _chosen(distances: Tensor, malicious: int) -> list[int]:
    """The n − 2f updates that Krum takes, one after the other."""
    left = list(range(len(distances)))
    chosen = list[int]()
    while len(chosen) < len(distances) - 2 * malicious:
        chosen.append(left.pop(rank_by_krum_score(distances[left][:, left], malicious)[0]))
    return chosen


def _around_middle(rows: Entries, without: int) -> Entries:
    """The mean over the first dimension of all but the `without` values that are farthest from the median."""
    ordered = sort_rows(rows).astype(np.float64)  # of two that are as far, the smaller stays
    middle = (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
    nearest = np.abs(ordered - middle).argsort(axis=0, kind="stable")[: len(rows) - without]
    return mean_rows(np.take_along_axis(ordered, nearest, axis=0))
