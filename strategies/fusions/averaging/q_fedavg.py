"""q-FedAvg: a mean that favors organizations with a high loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.errors import RunError
from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums, norm
from cotune.strategies.types import RoundContext, WeightedUpdate

_STEP = "Σ h_k / L"
_LEAST_LOSS = 1e-10  # added, as in the authors' code: F^(q − 1) of a perfect model


@fusion(
    "q_fedavg",
    cite="Li et al., ICLR 2020, https://arxiv.org/abs/1905.10497, algorithm 2",
    needs=Needs(weights=False, sends=("loss",), optimizers=("sgd",)),
    homogeneous=False,
    idempotent=False,
)
def q_fedavg(
    *, q: Annotated[float, Field(ge=0)] = 1.0, lipschitz: Annotated[float, Field(ge=0)] = 0.0, context: RoundContext
) -> Sums:
    """Favor organizations with a high loss F_k of the received model: D = Σ F_k^q Δ_k / Σ (F_k^q + q F_k^(q−1) L ‖Δ_k‖²).

    This is the paper's w − Σ F_k^q L(w − w̄_k) / Σ h_k, with both sums divided by L.

    Args:
        q: 0 gives the plain mean; the larger, the more the organizations with the highest losses count.
        lipschitz: L, the Lipschitz constant of the losses' gradients; 0: 1/η, where η is the local learning rate of gradient
            descent (Adam's learning rate is not comparable).

    Raises:
        RunError: If an update states no loss.
    """
    smoothness = lipschitz or 1 / context.local.learning_rate

    def contribution(update: WeightedUpdate) -> Mapping[str, Tensor]:
        loss = torch.tensor(_loss(update) + _LEAST_LOSS, dtype=torch.float64)
        step = loss**q + q * loss ** (q - 1) * smoothness * norm(update.delta) ** 2
        moves = {name: loss**q * tensor for name, tensor in update.delta.items()}
        return {**moves, _STEP: step}

    sums = yield contribution
    return {name: tensor / sums[_STEP] for name, tensor in sums.items() if name != _STEP}


def _loss(update: WeightedUpdate) -> float:
    loss = update.update.disclosures.get("loss", math.nan)
    if not 0 <= loss < math.inf:
        raise RunError(
            f"the update of {update.update.organization[:80]} states the loss {loss}: expected a finite number, 0 or more; let"
            " its policy disclose the loss, or choose another fusion",
            code="run.invalid_loss",
        )
    return loss
