"""TIES from two sums over the updates, without seeing any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.fusions.merging.trimming import trim_to_density
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.sums import Sums
from cotune.strategies.types import WeightedUpdate

_WEIGHT = "weight of "


@fusion(
    "ties_sums",
    cite="Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708, algorithm 1",
    needs=Needs(visibility=Visibility.SUM_2PASS),
    idempotent=False,
)
def ties_sums(*, density: Annotated[float, Field(gt=0, le=1)] = 0.2, scale: Annotated[float, Field(gt=0)] = 1.0) -> Sums:
    """Compute the result of `ties` from sums only: one pass to elect the signs, one to sum the entries that agree.

    Args:
        density: Fraction of entries to keep of each delta, over all its parameters together.
        scale: λ.
    """

    def votes_of(update: WeightedUpdate) -> Mapping[str, Tensor]:
        return {name: update.scalar * tensor for name, tensor in trim_to_density(update.delta, density).items()}

    votes = yield votes_of
    signs = {name: vote.sign() for name, vote in votes.items()}

    def agreeing(update: WeightedUpdate) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in trim_to_density(update.delta, density).items():
            agreed = update.scalar * ((tensor.sign() == signs[name]) & (tensor != 0))
            found |= {name: agreed * tensor, _WEIGHT + name: agreed}
        return found

    sums = yield agreeing
    return {name: torch.where(sums[_WEIGHT + name] > 0, scale * sums[name] / sums[_WEIGHT + name], 0.0) for name in signs}
