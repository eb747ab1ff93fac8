"""The point with the least distance to all updates (RFA)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor

from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.sums import Sums, norm, weighted, weighted_mean
from cotune.strategies.types import WeightedUpdate, difference

PASSES = 50  # at most; where nobody is far away, it stays after about twenty
SMOOTHING = 1e-6
_STILL = 1e-12  # of the center's length: a pass that moves it by less is the last


@fusion(
    "geometric_median",
    cite="Pillutla et al., IEEE TSP 2022, https://arxiv.org/abs/1912.13445",
    needs=Needs(visibility=Visibility.SUM_2PASS),
    homogeneous=False,
)
def geometric_median(
    *, passes: Annotated[int, Field(ge=1, le=1000)] = PASSES, smoothing: Annotated[float, Field(gt=0)] = SMOOTHING
) -> Sums:
    """D = argmin_z Σ p_k ‖Δ_k − z‖, by smoothed Weiszfeld: from the weighted mean on, z = Σ β_k Δ_k / Σ β_k, until it stays.

    β_k = p_k / max(ν, ‖Δ_k − z‖), so that who is far away pulls no more than who is near.

    passes: over the updates, after the one for the mean, at most; each divides the pull of one update that is very far away by
    about the number of the others. smoothing: ν, a length of deltas.
    """
    return (yield from weiszfeld(passes, smoothing))


def weiszfeld(passes: int, smoothing: float) -> Sums:
    """The passes of the rule, for any number of updates with their weights."""
    center = weighted_mean((yield weighted))
    for _ in range(passes):
        before = center
        center = weighted_mean((yield partial(_pulling, center=center, smoothing=smoothing)))
        if norm(difference(center, before)) <= _STILL * norm(center):
            break
    return center


def _pulling(update: WeightedUpdate, center: Mapping[str, Tensor], smoothing: float) -> dict[str, Tensor]:
    distance = max(smoothing, norm(difference(update.delta, center)))
    return {name: tensor / distance for name, tensor in weighted(update).items()}
