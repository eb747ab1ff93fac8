"""The mean of updates that are counted per local step."""

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
_TINY = 1e-300  # where every holder of a parameter weighs 0, its mean is 0


@fusion(
    "fednova",
    cite="Wang et al., NeurIPS 2020, https://arxiv.org/abs/2007.07481",
    needs=Needs(optimizers=("sgd",)),
    idempotent=False,
)
def fednova(*, context: RoundContext) -> Sums:
    """D = (Σ p_k τ_k) · Σ p_k Δ_k / τ_k: who takes more local steps has no more say.

    τ_k = ‖a_k‖₁: how much the gradients of local SGD with momentum count together in Δ_k = −η Σ a_ki g_i. Raises RunError for an
    update of no step, or of more than the plan's.
    """

    def contribution(update: WeightedUpdate) -> Mapping[str, Tensor]:
        steps = effective_steps(_steps(update, context.local.steps), context.local.momentum)
        per_step = weighted(update, {name: tensor / steps for name, tensor in update.delta.items()})
        weight = torch.tensor(update.scalar, dtype=torch.float64)
        return {**per_step, **{_STEPS + n: weight * steps for n in update.delta}, **{_WEIGHT + n: weight for n in update.delta}}

    sums = yield contribution
    return {n: d * sums[_STEPS + n] / sums[_WEIGHT + n].clamp(min=_TINY) for n, d in weighted_mean(sums).items()}


def effective_steps(steps: int, momentum: float) -> float:
    """τ = Σ_i (1 − μ^(K − i)) / (1 − μ), i = 0 … K − 1: gradient i is in the velocity of all K − i steps from its own on."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def _steps(update: WeightedUpdate, most: int) -> int:
    """Who states more steps than the plan has would move the model further."""
    steps = update.update.steps
    organization = update.update.organization[:80]
    if not 1 <= steps <= most:
        raise RunError(
            f"the update of {organization} states {steps} local steps: expected 1 to {most}; leave it out",
            code="run.invalid_steps",
        )
    return steps
