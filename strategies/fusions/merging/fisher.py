"""The mean that trusts every organization where its records say most."""

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
    """D = Σ w_k F_k Δ_k / Σ w_k F_k, entry by entry, with the diagonal Fisher information F_k of each trained model.

    F_k is the mean squared gradient of the organization's own records, for the labels that they have. floor: added to every F_k;
    where nobody's records say anything, it makes D the weighted mean.
    """

    def trusted(update: WeightedUpdate) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, delta in update.delta.items():
            trust = (update.update.statistics[f"fisher/{name}"].to(torch.float64) + floor) * update.weight_of(name)
            found |= {name: trust * delta, _TRUST + name: trust}
        return found

    sums = yield trusted
    return {name: sums[name] / sums[_TRUST + name] for name in sums if _TRUST + name in sums}
