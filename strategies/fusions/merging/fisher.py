"""Fisher merging: a mean that weights each entry by the Fisher information of the organization's records."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums
from cotune.strategies.types import WeightedUpdate

_TRUST = "trust in "


@fusion(
    "fisher",
    cite="Matena & Raffel, NeurIPS 2022, https://arxiv.org/abs/2111.09832, equation 4",
    needs=Needs(sends=("fisher",), by_parameter=True),
)
def fisher(*, floor: Annotated[float, Field(gt=0)] = 1e-6) -> Sums:
    """Average each entry by the diagonal Fisher information F_k of the trained models: D = Σ w_k F_k Δ_k / Σ w_k F_k.

    F_k is the mean squared gradient on the organization's own records with their true labels (the empirical Fisher information).

    Args:
        floor: Added to every F_k, so that D is the weighted mean where all F_k are 0.
    """

    def trusted(update: WeightedUpdate) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, delta in update.delta.items():
            trust = (update.update.statistics[f"fisher/{name}"].to(torch.float64) + floor) * update.weight_of(name)
            found |= {name: trust * delta, _TRUST + name: trust}
        return found

    sums = yield trusted
    return {name: sums[name] / sums[_TRUST + name] for name in sums if _TRUST + name in sums}
