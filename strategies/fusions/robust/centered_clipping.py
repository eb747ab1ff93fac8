"""Centered clipping: the mean of updates that are clipped around the previous round's result."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.fusions.robust.update_geometry import clip_to_norm
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.sums import Sums, weighted, weighted_mean
from cotune.strategies.types import Aggregate, RoundContext, WeightedUpdate

_NOTHING = torch.zeros((), dtype=torch.float64)


@fusion(
    "centered_clipping",
    cite="Karimireddy et al., ICML 2021, https://arxiv.org/abs/2012.10333",
    needs=Needs(visibility=Visibility.SUM_2PASS),
    homogeneous=False,
    idempotent=False,
)
def centered_clipping(
    *, norm: Annotated[float, Field(gt=0)] = 1.0, passes: Annotated[int, Field(ge=1, le=1000)] = 1, context: RoundContext
) -> Sums:
    """Clip updates around the previous result v (at first 0): v += Σ p_k (Δ_k − v) min(1, τ / ‖Δ_k − v‖); D = v.

    Args:
        norm: τ, the distance from v up to which an update counts in full.
        passes: Iterations over the updates in each round.
        context: Its memory is the v of the previous round.
    """
    center = dict(context.memory)
    for _ in range(passes):
        moves = weighted_mean((yield partial(_move, center=center, norm=norm)))
        center |= {name: center.get(name, _NOTHING) + move for name, move in moves.items()}
    return Aggregate({name: center[name] for name in moves}, memory=center)


def _move(update: WeightedUpdate, center: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    return weighted(update, clip_to_norm({n: d - center.get(n, _NOTHING) for n, d in update.delta.items()}, norm))
