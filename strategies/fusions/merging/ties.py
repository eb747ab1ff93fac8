"""Trim, elect a sign, merge what agrees: each update is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from cotune.strategies.fusions.merging.merging_ops import trim_to_density
from cotune.strategies.registry import Needs, Visibility, fusion
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
    """Of each update the largest entries; D = λ times the mean of those that have the sign of their sum.

    Δ̃_k is Δ_k with its smaller entries set to 0, γ = sgn(Σ w_k Δ̃_k), A_j = {k : sgn(Δ̃_kj) = γ_j ≠ 0} and
    D_j = λ Σ_{A_j} w_k Δ̃_kj / Σ_{A_j} w_k. The paper has equal weights; where nothing agrees, D_j = 0.

    density: the fraction of entries to keep of each update, over all its parameters together. scale: λ.
    """
    kept = [trim_to_density(u.delta, density) for u in updates]
    found = {}
    for name in dict.fromkeys(name for delta in kept for name in delta):
        held = [(u.scalar, delta[name]) for u, delta in zip(updates, kept, strict=True) if name in delta]
        deltas = torch.stack([delta for _, delta in held])
        weights = torch.tensor([w for w, _ in held], dtype=torch.float64).reshape(-1, *[1] * (deltas.dim() - 1))
        sign = (weights * deltas).sum(dim=0).sign()
        agreed = weights * ((deltas.sign() == sign) & (sign != 0))
        merged = (agreed * deltas).sum(dim=0)
        weight = agreed.sum(dim=0)
        found[name] = torch.where(weight > 0, scale * merged / weight, 0.0)
    return found
