"""Krum: the single update that is closest to its neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cotune.strategies.fusions.robust.update_geometry import compute_squared_distances, rank_by_krum_score
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import Delta, WeightedUpdate


@fusion(
    "krum",
    cite="Blanchard et al., NeurIPS 2017, https://arxiv.org/abs/1703.02757",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False),
    min_updates=lambda malicious: 2 * malicious + 3,
)
def krum(updates: Sequence[WeightedUpdate], *, malicious: Annotated[int, Field(ge=0)] = 1) -> Delta:
    """Select the one update with the smallest Σ ‖Δ_i − Δ_j‖² over its n − f − 2 nearest neighbors j.

    Args:
        updates: Their weights are not used.
        malicious: f, how many of the n updates may be malicious; n ≥ 2f + 3.
    """
    return dict(updates[rank_by_krum_score(compute_squared_distances(updates), malicious)[0]].delta)
