"""HetLoRA: means of zero-padded factors, weighted by the norm of each organization's product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cotune.strategies.fusions.adapters.low_rank import (
    average_deltas,
    delta_between,
    get_factors,
    normalize_weights,
    pad_to_shape,
    product_norm,
)
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import RoundContext, WeightedUpdate


@fusion(
    "hetlora",
    cite="Cho et al., EMNLP 2024, https://arxiv.org/abs/2401.06432",
    needs=Needs(visibility=Visibility.PER_CLIENT, adapters=("ab",), mixed_ranks=True),
    homogeneous=False,
)
def hetlora(updates: Sequence[WeightedUpdate], *, context: RoundContext) -> dict[str, Tensor]:
    """Average zero-padded A and B with p_k ∝ w_k ‖B_k A_k‖_F per adapter, so that padding weakens the mean less.

    The paper has w_k = 1 (the recipe `hetlora`) and prunes ranks during training; here each organization chooses its rank. Biased
    as `fedit` is. Under record-level privacy the noise on the two factors multiplies, and dominates the norms.
    """
    delta = average_deltas(updates)
    for adapter in context.adapters:
        factors = [get_factors(u, adapter) for u in updates]
        weights = [p * product_norm(b, a) for p, (b, a) in zip(normalize_weights(updates), factors, strict=True)]
        weights = weights if sum(weights) > 0 else normalize_weights(updates)
        b = context.state[adapter.b]
        a = context.state[adapter.a]
        new_b = torch.zeros_like(b, dtype=torch.float64)
        new_a = torch.zeros_like(a, dtype=torch.float64)
        for weight, (own_b, own_a) in zip(weights, factors, strict=True):
            new_b += pad_to_shape(own_b, b.shape) * (weight / sum(weights))
            new_a += pad_to_shape(own_a, a.shape) * (weight / sum(weights))
        delta |= delta_between(context.state, {adapter.b: new_b, adapter.a: new_a})
    return delta
