"""TIES: trim, elect signs, and merge the entries that agree; sees each update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from cotune.strategies.fusions.merging.trimming import smallest_kept
from cotune.strategies.order_statistics import fuse_coordinates, sum_rows
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.tensor_blocks import Entries
from cotune.strategies.types import Delta, WeightedUpdate


@fusion(
    "ties",
    cite="Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708, algorithm 1",
    needs=Needs(visibility=Visibility.PER_CLIENT),
    idempotent=False,
)
def ties(
    updates: Sequence[WeightedUpdate],
    *,
    density: Annotated[float, Field(gt=0, le=1)] = 0.2,
    scale: Annotated[float, Field(gt=0)] = 1.0,
) -> Delta:
    """Trim each delta to its largest entries, elect a sign per entry, and average the entries that agree with it.

    Δ̃_k is Δ_k with its smaller entries set to 0, γ = sgn(Σ w_k Δ̃_k), A_j = {k : sgn(Δ̃_kj) = γ_j ≠ 0} and
    D_j = λ Σ_{A_j} w_k Δ̃_kj / Σ_{A_j} w_k; D_j = 0 if A_j is empty. The paper has equal weights.

    Args:
        updates: Each with one weight w_k.
        density: Fraction of entries to keep of each delta, over all its parameters together.
        scale: λ.
    """
    deltas = [update.entries for update in updates]
    smallest = [smallest_kept(delta, density) for delta in deltas]
    weights = [update.scalar for update in updates]

    def merge(rows: Entries, numbers: Sequence[int]) -> Entries:
        for row, k in zip(rows, numbers, strict=True):
            row[np.abs(row) < smallest[k]] = 0.0
        weighted = [row * np.float64(weights[k]) for row, k in zip(rows, numbers, strict=True)]
        sign = np.sign(sum_rows(weighted))
        agreeing = [(np.sign(row) == sign) & (sign != 0) for row in rows]
        weight = sum_rows([agrees * weights[k] for agrees, k in zip(agreeing, numbers, strict=True)])
        merged = sum_rows([agrees * row for agrees, row in zip(agreeing, weighted, strict=True)])
        return np.where(weight > 0, scale * merged / np.where(weight > 0, weight, 1.0), 0.0)

    return fuse_coordinates(deltas, merge)
