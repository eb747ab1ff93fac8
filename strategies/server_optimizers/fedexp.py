"""FedExP: a server step whose length depends on how much the updates differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.registry import Needs, server_optimizer
from cotune.strategies.server_optimizers.base import ServerOptimizer
from cotune.strategies.sums import norm
from cotune.strategies.types import Aggregate, RoundContext, apply_delta


@server_optimizer(
    "fedexp",
    cite="Jhunjhunwala, Wang & Joshi, ICLR 2023, https://arxiv.org/abs/2301.09604",
    needs=Needs(mean=True, client_privacy="its step needs Σ‖Δ_k‖² beside the sum of the updates, a release that no noise covers"),
)
@dataclass(frozen=True)
class FedExP(ServerOptimizer):
    """Step θ += η_g·D with η_g = max(1, Σ p_k ‖Δ_k‖² / (2(‖D‖² + ε))), which is longer the more the updates differ.

    The mean of the last two θ is evaluated and sent, as θ oscillates under η_g. Under record-level privacy, ‖Δ_k‖² contains an
    update's full noise and ‖D‖² only the averaged noise, so that noise alone pushes η_g towards half the number of organizations.

    Args:
        epsilon: ε, in the squared unit of the parameters; it bounds η_g if the updates cancel out.
    """

    epsilon: Annotated[float, Field(gt=0)] = 1e-3

    def step(
        self, state: Mapping[str, Tensor], fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take the step; the memory is the θ before it, of the parameters that moved."""
        rate = max(1.0, fused.mean_squared_norm / (2 * (norm(fused.delta) ** 2 + self.epsilon)))
        moved = apply_delta(state, fused.delta, rate)
        return moved, {name: state[name] for name in fused.delta}

    def serve(self, state: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of the last two θ, for the parameters that the last round moved."""
        halves = {name: (before.to(torch.float64) - state[name].to(torch.float64)) / 2 for name, before in memory.items()}
        return apply_delta(state, halves)
