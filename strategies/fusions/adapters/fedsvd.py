"""FedSVD: the mean of B under a shared A, refactored by SVD."""

from __future__ import annotations

import torch

from cotune.strategies.fusions.adapters.low_rank import delta_between, truncate_to_rank
from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums, weighted, weighted_mean
from cotune.strategies.types import RoundContext


@fusion(
    "fedsvd",
    cite="Lee et al., NeurIPS 2025, https://arxiv.org/abs/2505.12805",
    needs=Needs(by_parameter=True, adapters=("b",), rewrites=("a",), sets_state=True),
    homogeneous=False,
    idempotent=False,
)
def fedsvd(*, context: RoundContext) -> Sums:
    """Average B by weight and refactor the product: UΣVᵀ = B̄·A, B = UΣ, A = Vᵀ, so that A follows what was learned.

    Exact: all organizations train B under the same A, so the mean of the products is B̄·A, and its rank is not reduced. Noise is
    on one factor only, and the refactoring is post-processing: with FFA-LoRA, this is the choice under record-level privacy. The
    orthonormal rows of A bound the gradients of B.
    """
    sums = yield weighted
    delta = weighted_mean(sums)
    for adapter in context.adapters:
        a = context.state[adapter.a].to(torch.float64)
        b, a = truncate_to_rank(context.state[adapter.b] + delta[adapter.b], a, adapter.rank)
        delta |= delta_between(context.state, {adapter.b: b, adapter.a: a})
    return delta
