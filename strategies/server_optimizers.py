"""How the fused delta moves the shared model: an optimiser on the pseudo-gradient −D (Reddi et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cotune.strategies.updates import Delta, apply_delta

__all__ = ["SERVER_OPTIMIZERS", "ServerOptimizer", "ServerSGD"]


class ServerOptimizer(Protocol):
    """(model, fused delta, own state) -> (model, own state); the state is tensors, checkpointed with the round."""

    def step(
        self, state: Mapping[str, Tensor], delta: Delta, memory: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...


@dataclass(frozen=True)
class ServerSGD:
    """θ += lr·v with v = momentum·v + D; lr 1 and momentum 0 is FedAvg, momentum above 0 FedAvgM (Hsu et al., 2019)."""

    lr: float = 1.0
    momentum: float = 0.0

    def step(
        self, state: Mapping[str, Tensor], delta: Delta, memory: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self.momentum:
            return apply_delta(state, {name: d * self.lr for name, d in delta.items()}), {}
        moving = {name: d.to(torch.float64) + self.momentum * memory.get(name, torch.zeros(())) for name, d in delta.items()}
        return apply_delta(state, {name: v * self.lr for name, v in moving.items()}), {**memory, **moving}


SERVER_OPTIMIZERS: dict[str, Callable[..., Any]] = {"sgd": ServerSGD}
