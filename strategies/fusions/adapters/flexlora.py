"""FlexLoRA: the mean of the products, truncated to the rank of the adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cotune.strategies.fusions.adapters.low_rank import (
    average_deltas,
    delta_between,
    get_factors,
    normalize_weights,
    stack_factors,
    truncate_to_rank,
)
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import RoundContext, WeightedUpdate


@fusion(
    "flexlora",
    cite="Bai et al., NeurIPS 2024, https://arxiv.org/abs/2402.11505; blocks: Wu et al., 2026, https://arxiv.org/abs/2602.13486",
    needs=Needs(visibility=Visibility.PER_CLIENT, adapters=("ab", "b"), mixed_ranks=True, rewrites=("a", "b"), sets_state=True),
    homogeneous=False,
    idempotent=False,
)
def flexlora(updates: Sequence[WeightedUpdate], *, context: RoundContext, blocks: bool = False) -> dict[str, Tensor]:
    """Approximate Σ p_k B_k A_k by the best product of rank r, by SVD: B = U_r Σ_r, A = V_rᵀ.

    Under record-level privacy the noise on two trained factors multiplies; with lora.factors = "b" it is on B only.

    Args:
        blocks: Average each of the r products of a column of B_k and a row of A_k over the organizations whose rank includes it
            (raFLoRA). Without it, if ranks differ, directions that only a few organizations train shrink from round to round,
            until only the smallest rank is left.
    """
    delta = average_deltas(updates)
    for adapter in context.adapters:
        factors = [get_factors(u, adapter) for u in updates]
        received = context.state[adapter.a].to(torch.float64)
        weights = _by_column(factors, normalize_weights(updates)) if blocks else normalize_weights(updates)
        nothing = (torch.zeros_like(context.state[adapter.b], dtype=torch.float64), received)  # directions, where there are few
        b, a = truncate_to_rank(*stack_factors([*factors, nothing], [*weights, 0.0]), adapter.rank)
        delta |= delta_between(context.state, {adapter.b: b, adapter.a: a})
    return delta


def _by_column(factors: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]) -> list[Tensor]:
    """Return q_k (r_k,) for each k: p_k divided by the sum of p over those that have the column; 0 if that sum is 0."""
    ranks = [a.shape[0] for _, a in factors]
    held = torch.zeros(max(ranks), dtype=torch.float64)
    for rank, share in zip(ranks, shares, strict=True):
        held[:rank] += share
    each = torch.where(held > 0, 1 / held, 0.0)
    return [share * each[:rank] for rank, share in zip(ranks, shares, strict=True)]
