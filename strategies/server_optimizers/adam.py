"""Adam on the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from cotune.strategies.registry import server_optimizer
from cotune.strategies.server_optimizers.adaptive import adaptive_step
from cotune.strategies.server_optimizers.base import ServerOptimizer
from cotune.strategies.server_optimizers.schedules import Schedule, Warmup, compute_rate
from cotune.strategies.types import Aggregate, RoundContext


@server_optimizer("adam", cite="Reddi et al., ICLR 2021, https://arxiv.org/abs/2003.00295, algorithm 2 (FedAdam)")
@dataclass(frozen=True)
class ServerAdam(ServerOptimizer):
    """Step θ += lr·m / (√v + τ) with m = β1·m + (1 − β1)·D and v = β2·v + (1 − β2)·D², without bias correction.

    Args:
        lr: η, about how far a coordinate moves in a round.
        beta1: β1 of the first moment.
        beta2: β2 of the second moment.
        tau: τ; a coordinate whose |D| is smaller moves less.
        schedule: How the rate changes over the rounds.
        warmup: Rounds in which the rate grows to lr.
    """

    lr: Annotated[float, Field(gt=0, le=1e3)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Schedule = "constant"
    warmup: Warmup = 0

    def step(
        self, state: Mapping[str, Tensor], fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take an adaptive step with v = β2·v + (1 − β2)·D²."""
        rate = compute_rate(self.lr, self.schedule, self.warmup, context)

        def second(v: Tensor, square: Tensor) -> Tensor:
            return self.beta2 * v + (1 - self.beta2) * square

        return adaptive_step(state, fused.delta, memory, rate=rate, beta1=self.beta1, tau=self.tau, second_moment=second)
