"""The variance of the privacy noise on each coordinate of a delta, known before training.

In every step the gradient carries noise of standard deviation s = σC/B per coordinate; the optimizer accumulates it over the T
steps of a round. For SGD with momentum μ and weight decay λ this is a linear recurrence, and the variance is s² Σ_t h_t², h_t
being what a unit impulse in step t has done to the parameter after step T (plain SGD: T (ησC/B)²). Adam and AdamW divide by the
size of what they see, so that noise alone moves a coordinate by a factor of η that does not depend on s: the variance is
*defined* here as that of torch's own optimizer fed with nothing but noise, over 50,000 coordinates under a fixed seed.

Both leave out the loss. Curvature pulls noise back (SGD: an upper estimate where the loss is convex), and where the gradient is
as large as the noise Adam divides by both (an upper estimate too).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

_COORDINATES = 50_000  # of the simulated optimizer: the variance is found to √(2/50000) = 0.6 %
_SEED = 20


@dataclass(frozen=True)
class LocalOptimizer:
    """A local optimizer, whose state starts again in every round; anything else has torch's defaults.

    Attributes:
        kind: Which of torch's optimizers.
        learning_rate: η.
        momentum: μ, of sgd only.
        weight_decay: λ.
    """

    kind: Literal["sgd", "adam", "adamw"]
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0


def delta_noise_variance(
    optimizer: LocalOptimizer, *, noise_multiplier: float, clip_norm: float, expected_batch: float, steps: int
) -> float:
    """Return v, the variance of the privacy noise on each coordinate of θ_T − θ_0 after T steps of DP-SGD.

    Args:
        optimizer: Of local training.
        noise_multiplier: σ.
        clip_norm: C.
        expected_batch: B.
        steps: T.
    """
    noise = noise_multiplier * clip_norm / expected_batch  # s
    if optimizer.kind == "sgd":
        return noise**2 * _response(optimizer.learning_rate, optimizer.momentum, optimizer.weight_decay, steps)
    return _simulated(optimizer, noise, steps)


def _response(rate: float, momentum: float, decay: float, steps: int) -> float:
    """Return Σ h² by simulating one unit impulse: v ← μv + g + λθ, θ ← θ − ηv. Later impulses respond alike, for fewer steps."""
    total = 0.0
    position = 0.0
    velocity = 0.0
    for step in range(steps):
        velocity = momentum * velocity + (1.0 if step == 0 else 0.0) + decay * position
        position -= rate * velocity
        total += position**2
    return total


@lru_cache(maxsize=256)
def _simulated(optimizer: LocalOptimizer, noise: float, steps: int) -> float:
    generator = torch.Generator().manual_seed(_SEED)
    parameter = torch.zeros(_COORDINATES, requires_grad=True)
    kind = torch.optim.AdamW if optimizer.kind == "adamw" else torch.optim.Adam
    torch_optimizer = kind([parameter], lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay)
    for _ in range(steps):
        parameter.grad = torch.randn(_COORDINATES, generator=generator) * noise
        torch_optimizer.step()
    return float(parameter.detach().double().pow(2).mean())
