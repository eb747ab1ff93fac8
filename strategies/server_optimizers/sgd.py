"""Gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.registry import server_optimizer
from cotune.strategies.server_optimizers.base import ServerOptimizer
from cotune.strategies.server_optimizers.schedules import Schedule, Warmup, compute_rate
from cotune.strategies.types import Aggregate, RoundContext, apply_delta


@server_optimizer("sgd", cite="Hsu et al., 2019, https://arxiv.org/abs/1909.06335")
@dataclass(frozen=True)
class ServerSGD(ServerOptimizer):
    """Step θ += lr·v with v = momentum·v + D; lr 1 and momentum 0 is FedAvg, momentum above 0 is FedAvgM.

    Args:
        lr: Learning rate.
        momentum: Factor of the previous rounds' steps.
        nesterov: Step θ += lr·(D + momentum·v) as in torch (Sutskever et al., ICML 2013). It is the outer step of DiLoCo
            (Douillard et al., 2023, algorithm 1), whose workers take hundreds of AdamW steps between two rounds.
        schedule: How the rate changes over the rounds.
        warmup: Rounds in which the rate grows to lr.
    """

    lr: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    schedule: Schedule = "constant"
    warmup: Warmup = 0

    def step(
        self, state: Mapping[str, Tensor], fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take a momentum step; the memory is the velocity v."""
        rate = compute_rate(self.lr, self.schedule, self.warmup, context)
        if not self.momentum:
            return apply_delta(state, fused.delta, rate), {}
        delta = fused.delta.items()
        moving = {name: d.to(torch.float64) + self.momentum * memory.get(name, torch.zeros(())) for name, d in delta}
        ahead = {name: d.to(torch.float64) + self.momentum * moving[name] for name, d in delta} if self.nesterov else moving
        return apply_delta(state, ahead, rate), {**memory, **moving}
