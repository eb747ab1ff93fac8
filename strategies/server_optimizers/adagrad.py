"""Adagrad on the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.registry import server_optimizer
from cotune.strategies.server_optimizers.adaptive import adaptive_step
from cotune.strategies.server_optimizers.base import ServerOptimizer
from cotune.strategies.server_optimizers.schedules import Schedule, Warmup, compute_rate
from cotune.strategies.types import Aggregate, RoundContext


@server_optimizer("adagrad", cite="Reddi et al., ICLR 2021, https://arxiv.org/abs/2003.00295, algorithm 2 (FedAdagrad)")
@dataclass(frozen=True)
class ServerAdagrad(ServerOptimizer):
    """Step as `adam` does, but with v = v + D², so that a coordinate moves less the more it has moved.

    Args:
        lr: η, about how far a coordinate moves in the first rounds.
        beta1: β1 of the first moment; 0 in the paper's experiments.
        tau: τ; a coordinate whose |D| is smaller moves less.
        schedule: How the rate changes over the rounds.
        warmup: Rounds in which the rate grows to lr.
    """

    lr: Annotated[float, Field(gt=0, le=1e3)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tau: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Schedule = "constant"
    warmup: Warmup = 0

    def step(
        self, state: Mapping[str, Tensor], fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take an adaptive step with v = v + D²."""
        rate = compute_rate(self.lr, self.schedule, self.warmup, context)
        return adaptive_step(state, fused.delta, memory, rate=rate, beta1=self.beta1, tau=self.tau, second_moment=torch.add)
