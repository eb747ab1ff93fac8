"""Multi-Krum: the mean of the updates that are closest to their neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cotune.strategies.fusions.robust.update_geometry import compute_squared_distances, rank_by_krum_score, unweighted_mean
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import Delta, WeightedUpdate


@fusion(
    "multi_krum",
    cite="Blanchard et al., NeurIPS 2017, https://arxiv.org/abs/1703.02757",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False),
    min_updates=lambda malicious, keep: max(2 * malicious + 3, keep),
)
def multi_krum(
    updates: Sequence[WeightedUpdate], *, malicious: Annotated[int, Field(ge=0)] = 1, keep: Annotated[int, Field(ge=0)] = 0
) -> Delta:
    """Average the m updates with the best Krum scores (see `krum`).

    Args:
        updates: Their weights are not used.
        malicious: f, how many of the n updates may be malicious; n ≥ 2f + 3.
        keep: m; 0: n − f.
    """
    best = rank_by_krum_score(compute_squared_distances(updates), malicious)[: keep or len(updates) - malicious]
    return unweighted_mean([updates[k] for k in best])
