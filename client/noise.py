"""What an organisation says about the privacy noise in its delta, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cotune.plan.schema import LocalTraining
from cotune.privacy.delta_noise import LocalOptimizer, delta_noise_variance

__all__ = ["noise_variance"]


def noise_variance(
    local: LocalTraining, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, scale: float, steps: int
) -> dict[str, float]:
    """Parameter name -> variance of the noise on each coordinate of its delta, to 3 significant digits.

    scale: σC/B, standard deviation of the noise on a step's gradient. It follows from public settings, the declared number of
    records and the organisation's ε: nothing about its records is told by it.
    """
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in parameters.items():
        settings = LocalOptimizer(local.optimizer, rates[id(parameter)], local.momentum, local.weight_decay)
        variance = delta_noise_variance(settings, noise_multiplier=scale, clip_norm=1.0, expected_batch=1.0, steps=steps)
        found[name] = float(f"{variance:.3g}")
    return found
