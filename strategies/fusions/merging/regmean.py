"""The linear layers that come closest to what every organization's own layer does with its own inputs."""

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
_NOTHING = 1e-6  # of the largest eigenvalue: inputs that vary less are rounding, as the Gram matrices come in float32


@fusion(
    "regmean",
    cite="Jin et al., ICLR 2023, https://arxiv.org/abs/2212.09849, equation 2",
    needs=Needs(sends=("gram",), by_parameter=True),
)
def regmean(*, off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9) -> Sums:
    """D = (Σ w_k Δ_k G_k)(Σ w_k G_k)⁻¹ for every linear layer, G_k = X_kᵀX_k of its inputs; the weighted mean for all else.

    That is least squares: of Σ w_k ‖X_k D − X_k Δ_k‖². A bias is a column of Δ_k, its input 1. Where no organization's inputs
    vary, D is the weighted mean. off_diagonal: α, the factor of all entries of G_k but its diagonal; below 1 the layers of
    models that have drifted apart are fused more cautiously.
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
    """In float64. Raises RunError for one that is not finite: it has no inverse."""
    for key, tensor in statistics.items():
        if key.startswith("gram/"):
            if not bool(tensor.isfinite().all()):
                raise RunError(f"{key} of an update is not finite: expected finite values", code="run.update_not_finite")
            yield key.removeprefix("gram/"), tensor.to(torch.float64)


def _with_bias(name: str, delta: Mapping[str, Tensor], gram: Tensor) -> Tensor:
    """(out, in), or (out, in + 1) where the Gram matrix has a row for the bias."""
    weight = delta[name]
    return weight if len(gram) == weight.shape[1] else torch.cat([weight, delta[_bias(name)][:, None]], dim=1)


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"
