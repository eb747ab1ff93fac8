"""Consensus merging: the mean of entries that matter to several updates; all other entries stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.sums import Sums, weighted, weighted_mean
from cotune.strategies.types import WeightedUpdate

_PLAIN = "plain sum of "


@fusion(
    "consensus",
    cite="Wang et al., ICML 2024, https://arxiv.org/abs/2405.07813",
    needs=Needs(visibility=Visibility.SUM_2PASS),
    min_updates=lambda threshold, agreement: int(agreement),
    idempotent=False,
)
def consensus(*, threshold: Annotated[float, Field(gt=0)] = 0.4, agreement: Annotated[int, Field(ge=1)] = 2) -> Sums:
    """Average the entries that matter to several updates (TALL masks): D_j = Σ p_k Δ_kj there, 0 elsewhere.

    Entry j matters to update k if |Δ_kj| > λ |Σ Δ_j − Δ_kj|: its own entry, compared with the sum of all others.

    Args:
        threshold: λ; the smaller it is, the more entries matter.
        agreement: To how many updates an entry must matter.
    """

    def both(update: WeightedUpdate) -> Mapping[str, Tensor]:
        return {**weighted(update), **{_PLAIN + name: tensor * _counts(update) for name, tensor in update.delta.items()}}

    first = yield both

    def masks(update: WeightedUpdate) -> Mapping[str, Tensor]:
        rest = {n: (first[_PLAIN + n] - d).abs() for n, d in update.delta.items()}
        return {n: (d.abs() > threshold * rest[n]).double() * _counts(update) for n, d in update.delta.items()}

    mattering = yield masks
    return {name: torch.where(mattering[name] >= agreement, tensor, 0.0) for name, tensor in weighted_mean(first).items()}


def _counts(update: WeightedUpdate) -> float:
    """Return 1, or 0 for an update of weight 0, which has no influence on the masks either."""
    return float(update.scalar > 0)
