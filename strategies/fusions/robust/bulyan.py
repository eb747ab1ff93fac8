"""Bulyan: selection by Krum against distant updates, then a trimmed mean against updates that deviate in few coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from cotune.strategies.fusions.robust.update_geometry import compute_squared_distances, rank_by_krum_score
from cotune.strategies.order_statistics import fuse_coordinates, mean_rows, sort_rows
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.tensor_blocks import Entries
from cotune.strategies.types import Delta, WeightedUpdate


@fusion(
    "bulyan",
    cite="El Mhamdi et al., ICML 2018, https://arxiv.org/abs/1802.07927",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False),
    min_updates=lambda malicious: 4 * malicious + 3,
)
def bulyan(updates: Sequence[WeightedUpdate], *, malicious: Annotated[int, Field(ge=0)] = 1) -> Delta:
    """Select n − 2f updates by Krum, one by one; then average the n − 4f values nearest to the median of each coordinate.

    Once selected, an update no longer counts as a neighbor of the remaining ones.

    Args:
        updates: Their weights are not used.
        malicious: f, how many of the n updates may be malicious; n ≥ 4f + 3.
    """
    chosen = _chosen(compute_squared_distances(updates), malicious)
    return fuse_coordinates([updates[k].entries for k in chosen], lambda rows, _: _around_middle(rows, 2 * malicious))


def _chosen(distances: Tensor, malicious: int) -> list[int]:
    """Return the numbers of the n − 2f updates that Krum selects one after the other."""
    left = list(range(len(distances)))
    chosen = list[int]()
    while len(chosen) < len(distances) - 2 * malicious:
        chosen.append(left.pop(rank_by_krum_score(distances[left][:, left], malicious)[0]))
    return chosen


def _around_middle(rows: Entries, without: int) -> Entries:
    """Return the mean over the first dimension without the `without` values farthest from the median."""
    ordered = sort_rows(rows).astype(np.float64)  # on ties, the smaller value is kept
    middle = (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
    nearest = np.abs(ordered - middle).argsort(axis=0, kind="stable")[: len(rows) - without]
    return mean_rows(np.take_along_axis(ordered, nearest, axis=0))
