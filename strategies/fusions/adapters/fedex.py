"""FedEx-LoRA: FedIT, with its error added to the frozen weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cotune.strategies.fusions.adapters.low_rank import (
    average_deltas,
    get_factors,
    normalize_weights,
    stack_factors,
    weight_change,
)
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import RoundContext, WeightedUpdate


@fusion(
    "fedex",
    cite="Singhal, Ponkshe & Vepakomma, ACL 2025, https://arxiv.org/abs/2410.09432",
    needs=Needs(visibility=Visibility.PER_CLIENT, adapters=("ab",), rewrites=("weight",), sets_state=True),
    homogeneous=False,
)
def fedex(updates: Sequence[WeightedUpdate], *, context: RoundContext) -> dict[str, Tensor]:
    """Average A and B, and add the error of doing so to the frozen weights: W += s(Σ p_k B_k A_k − B̄·Ā), which is exact.

    The adapted weights are sent to organizations, too. Under record-level privacy the noise on the two factors multiplies: use
    FFA-LoRA or `fedsvd` instead.
    """
    delta = average_deltas(updates)
    for adapter in context.adapters:
        left, right = stack_factors([get_factors(u, adapter) for u in updates], normalize_weights(updates))
        b = context.state[adapter.b] + delta[adapter.b]
        a = context.state[adapter.a] + delta[adapter.a]
        delta[adapter.weight] = weight_change(adapter, left @ right - b @ a)
    return delta
