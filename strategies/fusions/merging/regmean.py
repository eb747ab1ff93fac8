"""RegMean: fuse linear layers by least squares on their outputs for each organization's own inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.errors import RunError
from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums, weighted, weighted_mean
from cotune.strategies.types import WeightedUpdate

_GRAM = "gram of "
_OUT = "output of "
_NOTHING = 1e-6  # of the largest eigenvalue; smaller ones are rounding errors, as Gram matrices are sent in float32


@fusion(
    "regmean",
    cite="Jin et al., ICLR 2023, https://arxiv.org/abs/2212.09849, equation 2",
    needs=Needs(sends=("gram",), by_parameter=True),
)
def regmean(*, off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9) -> Sums:
    """Fuse linear layers by least squares, D = (Σ w_k Δ_k G_k)(Σ w_k G_k)⁻¹, G_k = X_kᵀX_k; average all other parameters.

    For α = 1, D minimizes Σ w_k ‖X_k Dᵀ − X_k Δ_kᵀ‖², where the rows of X_k are the layer's inputs at organization k. A bias is a
    column of Δ_k whose input is 1. In directions in which no organization's inputs vary, D is the weighted mean.

    Args:
        off_diagonal: α, the factor of the entries of G_k off its diagonal. Below 1, it fuses layers of models that have drifted
            apart more cautiously.
    """

    def summed(update: WeightedUpdate) -> dict[str, Tensor]:
        found = weighted(update)
        for name, gram in _grams(update.update.statistics):
            shrunk = (off_diagonal * gram + (1 - off_diagonal) * gram.diag().diag()) * update.weight_of(name)
            found |= {_GRAM + name: shrunk, _OUT + name: _with_bias(name, update.delta, gram) @ shrunk}
        return found

    sums = yield summed
    delta = weighted_mean(sums)
    for name in [name for name in delta if _GRAM + name in sums]:
        gram = sums[_GRAM + name]
        mean = _with_bias(name, delta, sums[_GRAM + name])
        inverse = torch.linalg.pinv(gram, rtol=_NOTHING, hermitian=True)
        best = mean + (sums[_OUT + name] - mean @ gram) @ inverse
        width = delta[name].shape[1]
        delta[name] = best[:, :width]
        if best.shape[1] > width:
            delta[_bias(name)] = best[:, width]
    return delta


def _grams(statistics: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter, Gram matrix in float64); raises RunError for one that is not finite, as it has no inverse."""
    for key, tensor in statistics.items():
        if key.startswith("gram/"):
            if not bool(tensor.isfinite().all()):
                raise RunError(f"{key} of an update is not finite: expected finite values", code="run.update_not_finite")
            yield key.removeprefix("gram/"), tensor.to(torch.float64)


def _with_bias(name: str, delta: Mapping[str, Tensor], gram: Tensor) -> Tensor:
    """Return the layer's delta, (out, in), or (out, in + 1) if the Gram matrix has a row for the bias."""
    weight = delta[name]
    return weight if len(gram) == weight.shape[1] else torch.cat([weight, delta[_bias(name)][:, None]], dim=1)


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"
