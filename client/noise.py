"""What an organisation says about the privacy noise in its delta: where the plan's weighting asks and its policy agrees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cotune.client.account import Account
from cotune.plan.tables import LocalTraining, Stage
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.delta_noise import LocalOptimizer, delta_noise_variance


def stated_noise(
    account: Account,
    sigma: float,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, float] | None:
    """Parameter name -> variance of the noise on each coordinate of its delta; None where nothing is to be said.

    sigma: the noise multiplier of the round, which follows from public numbers, as all of this does.
    """
    plan, policy, examples = account.plan, account.policy, account.public_examples
    if not (plan.strategy.compares_noise and policy.tell.noise_level and isinstance(plan.privacy, RecordPrivacy)):
        return None
    scale = sigma * plan.privacy.clip_norm / (stage.local.sample_rate(examples) * examples)  # σC/B
    return noise_variance(stage.local, optimizer, parameters, scale=scale, steps=stage.local.steps_of(examples))


def noise_variance(
    local: LocalTraining, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, scale: float, steps: int
) -> dict[str, float]:
    """The variances to 3 significant digits after `steps` steps. scale: σC/B, standard deviation of the noise on a step's
    gradient.
    """
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in parameters.items():
        settings = LocalOptimizer(local.optimizer, rates[id(parameter)], local.momentum, local.weight_decay)
        variance = delta_noise_variance(settings, noise_multiplier=scale, clip_norm=1.0, expected_batch=1.0, steps=steps)
        found[name] = float(f"{variance:.3g}")
    return found
