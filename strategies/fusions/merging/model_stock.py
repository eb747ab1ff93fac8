"""Model Stock: the mean, scaled down by how much the updates disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums, norm
from cotune.strategies.types import WeightedUpdate

_DIRECTION = "direction of "
_COUNT = "count of "
_ONE = torch.ones((), dtype=torch.float64)


@fusion(
    "model_stock",
    cite="Jang et al., ECCV 2024, https://arxiv.org/abs/2403.19522",
    needs=Needs(weights=False),
    min_updates=lambda **_: 2,
)
def model_stock(*, per: Literal["model", "parameter"] = "model") -> Sums:
    """Scale the mean by the updates' agreement: D = t · mean Δ_k, t = Nc / (1 + (N − 1)c), c the mean cosine of two updates.

    With u_k = Δ_k / ‖Δ_k‖, c = (‖Σ u_k‖² − N) / (N(N − 1)), so that one sum suffices. If c ≤ 0, the updates oppose one another
    and the paper's geometry does not hold: t is 0, and the model stays as it is.

    Args:
        per: What the cosine is measured on: the whole delta, or each parameter separately, closest to the paper's layers.
    """

    def contribution(update: WeightedUpdate) -> Mapping[str, Tensor]:
        delta = update.delta
        whole = norm(delta)
        found = dict(delta)
        for name, tensor in delta.items():
            length = whole if per == "model" else norm({name: tensor})
            found |= {_DIRECTION + name: tensor / length if length else tensor, _COUNT + name: _ONE}
        return found

    sums = yield contribution
    names = [name.removeprefix(_COUNT) for name in sums if name.startswith(_COUNT)]
    groups = [names] if per == "model" else [[name] for name in names]
    return {name: _ratio(sums, group) * sums[name] / sums[_COUNT + name] for group in groups for name in group}


def _ratio(sums: Mapping[str, Tensor], names: list[str]) -> float:
    """Return t for some parameters together."""
    count = max(float(sums[_COUNT + name]) for name in names)
    if count < 2:
        return 1.0  # only one organization has the parameter
    square = norm({name: sums[_DIRECTION + name] for name in names}) ** 2
    cosine = max(0.0, (square - count) / (count * (count - 1)))
    return count * cosine / (1 + (count - 1) * cosine)
