"""Norm bounding: the weighted mean of clipped updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from cotune.strategies.fusions.robust.update_geometry import clip_to_norm
from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums, weighted, weighted_mean
from cotune.strategies.types import WeightedUpdate


@fusion(
    "norm_bound",
    cite="Sun et al., 2019, https://arxiv.org/abs/1911.07963",
    needs=Needs(by_parameter=True, mixed_ranks=True),
    homogeneous=False,
    idempotent=False,
)
def norm_bound(*, norm: Annotated[float, Field(gt=0)] = 1.0) -> Sums:
    """Average clipped deltas, D = Σ p_k Δ_k min(1, τ / ‖Δ_k‖), so that no organization moves the model by more than p_k τ.

    Args:
        norm: τ, the largest L2 norm of a delta over all its parameters.
    """

    def contribution(update: WeightedUpdate) -> Mapping[str, Tensor]:
        return weighted(update, clip_to_norm(update.delta, norm))

    return weighted_mean((yield contribution))
