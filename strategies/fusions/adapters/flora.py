"""FLoRA: the weighted sum of the products is merged into the frozen weights, and the adapters are initialized again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cotune.models.adapters.adapter import init_lora_a, parameter_seed
from cotune.strategies.fusions.adapters.low_rank import (
    average_deltas,
    delta_between,
    get_factors,
    normalize_weights,
    stack_factors,
    weight_change,
)
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import RoundContext, WeightedUpdate


@fusion(
    "flora",
    cite="Wang et al., NeurIPS 2024, https://arxiv.org/abs/2409.05976",
    needs=Needs(
        visibility=Visibility.PER_CLIENT,
        adapters=("ab", "b"),
        mixed_ranks=True,
        rewrites=("a", "b", "weight"),
        sets_state=True,
    ),
    homogeneous=False,
    idempotent=False,
)
def flora(updates: Sequence[WeightedUpdate], *, context: RoundContext) -> dict[str, Tensor]:
    """Merge the stacked factors into the weights, W += s Σ p_k B_k A_k; then set B = 0 and redraw A from seed and round.

    Exact for any ranks, and the sum over rounds may have full rank. The server sends the adapted weights rather than the stacked
    factors, which would grow with the number of organizations. Under record-level privacy the noise on two trained factors
    multiplies; with lora.factors = "b" it is on B only.
    """
    delta = average_deltas(updates)
    for adapter in context.adapters:
        left, right = stack_factors([get_factors(u, adapter) for u in updates], normalize_weights(updates))
        old = context.state[adapter.a]
        fresh = init_lora_a(tuple(old.shape), parameter_seed(context.seed, f"{adapter.a}/{context.round}"))
        delta |= delta_between(context.state, {adapter.a: fresh, adapter.b: torch.zeros_like(context.state[adapter.b])})
        delta[adapter.weight] = weight_change(adapter, left @ right)
    return delta
