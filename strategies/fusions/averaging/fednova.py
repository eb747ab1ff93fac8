"""FedNova: the mean of updates, normalized by the number of local steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cotune.errors import RunError
from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums, weighted, weighted_mean
from cotune.strategies.types import RoundContext, WeightedUpdate

_STEPS = "steps of "
_WEIGHT = "weight in steps of "
_TINY = 1e-300  # makes the mean 0 if all that sent a parameter have the weight 0


@fusion(
    "fednova",
    cite="Wang et al., NeurIPS 2020, https://arxiv.org/abs/2007.07481",
    needs=Needs(optimizers=("sgd",)),
    idempotent=False,
)
def fednova(*, context: RoundContext) -> Sums:
    """Average updates per local step, D = (Σ p_k τ_k) · Σ p_k Δ_k / τ_k, so that more local steps give no more influence.

    τ_k = ‖a_k‖₁ is the total weight of the gradients of local SGD with momentum in Δ_k = −η Σ a_ki g_i.

    Raises:
        RunError: If an update states no step, or more than the plan has.
    """

    def contribution(update: WeightedUpdate) -> Mapping[str, Tensor]:
        steps = effective_steps(_steps(update, context.local.steps), context.local.momentum)
        per_step = weighted(update, {name: tensor / steps for name, tensor in update.delta.items()})
        weight = torch.tensor(update.scalar, dtype=torch.float64)
        return {**per_step, **{_STEPS + n: weight * steps for n in update.delta}, **{_WEIGHT + n: weight for n in update.delta}}

    sums = yield contribution
    return {n: d * sums[_STEPS + n] / sums[_WEIGHT + n].clamp(min=_TINY) for n, d in weighted_mean(sums).items()}


def effective_steps(steps: int, momentum: float) -> float:
    """Return τ = Σ_i (1 − μ^(K − i)) / (1 − μ), i = 0 … K − 1: gradient i is in the velocity of the K − i steps from its own on.

    Args:
        steps: K.
        momentum: μ, in [0, 1).
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def _steps(update: WeightedUpdate, most: int) -> int:
    """Return the update's number of steps; one above the plan's would move the model further, and is refused."""
    steps = update.update.steps
    organization = update.update.organization[:80]
    if not 1 <= steps <= most:
        raise RunError(
            f"the update of {organization} states {steps} local steps: expected 1 to {most}; leave it out",
            code="run.invalid_steps",
        )
    return steps
