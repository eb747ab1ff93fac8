"""DP-SGD (Abadi et al., CCS 2016, algorithm 1): clip each unit's gradient, add noise, step. Gradients of single rows are Opacus'.

Contract of `private_steps`: every step's update direction is (Σ_i Q(c_i) + round(σC·N(0, I))) / B, where i runs over a Poisson
sample with rate q of the units, c_i is the gradient of unit i's loss (the sum over its rows) over all trained parameters,
clipped to the norm C, and Q rounds it to the grid of `gaussian`, so that ‖Q(c_i)‖ ≤ C. σ is the noise multiplier, B the expected
batch, a public number. A unit more or less changes the sum by Q(c_i) exactly, and nothing else: that is what the accounting
assumes. An empty sample takes a step too (noise only). The noise comes from `private_generator`; a test may inject another
generator, which no plan can reach.

Why no ghost clipping: it finds norms from products and lets autograd form the sum, in which a row whose positions nearly cancel
can leave 56,843 times the clip norm in rounding errors. Here each clipped gradient exists before it is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cotune.errors import PrivacyError
from cotune.privacy.mechanisms.noise import Grid, add_gaussian_noise, grid_of
from cotune.privacy.mechanisms.per_example import (
    Batch,
    Batches,
    Clipping,
    ExactSum,
    LossPerExample,
    PerExample,
    Unit,
    per_example,
    unit_gradients,
)
from cotune.privacy.mechanisms.random import PoissonSampler, private_generator

_VANISHED = 1e-4  # norm of a made-up row's gradient below which the state says nothing about how gradients are made
_SHRINK = 0.1
_SHRINKS = 6  # states of more than 1e4 are refused before


@dataclass(frozen=True)
class StepReport:
    """What one step looked like, for the organization's own eyes: the loss is a private quantity."""

    step: int
    steps: int
    loss: float | None  # mean over the rows of the batch; None for an empty batch


def private_steps(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: LossPerExample,
    *,
    units: Sequence[Unit],
    batches: Batches,
    noise_multiplier: float,
    clip_norm: float,
    sample_rate: float,
    expected_batch: float,
    steps: int,
    clipping: Clipping = "flat",
    generator: np.random.Generator | None = None,
    sampling: np.random.Generator | None = None,
) -> Iterator[StepReport]:
    """Run the steps one after the other, and report each after it was taken.

    Args:
        module: In train mode; its parameters with requires_grad are those of the optimizer.
        loss: A batch -> the loss of each slot, of its row alone.
        units: The row numbers of each unit that is protected as a whole; a row belongs to one unit.
        batches: Row numbers -> batches of fixed shapes (see `per_example.Batches`).
        noise_multiplier: σ, noise standard deviation / clip norm.
        clip_norm: C, bound on the L2 norm of a unit's contribution.
        sample_rate: q, probability with which each unit enters a step.
        expected_batch: B, the public number that sums are divided by.
        generator: Of the noise; for tests only.
        sampling: Of the Poisson samples; for tests only.

    Raises:
        PrivacyError: When the parameters are not finite after a step: better no update than a wrong one.
    """
    with per_example(module, loss) as of:
        grid = grid_of(clip_norm, noise_multiplier, sum(p.numel() for p in of.parameters))
        noise = generator or private_generator()
        sampler = PoissonSampler(len(units), sample_rate, steps, sampling or private_generator())
        for step, sample in enumerate(sampler, start=1):
            totals, mean = _clipped_sum(of, [units[i] for i in sample], batches, grid, clipping)
            for p, total in zip(of.parameters, totals, strict=True):
                noised = add_gaussian_noise(total, clip_norm, noise_multiplier, noise)
                p.grad = noised.div_(expected_batch).to(p.dtype)
            optimizer.step()
            optimizer.zero_grad()
            _assert_finite(of.parameters)
            yield StepReport(step, steps, mean)


def _clipped_sum(
    of: PerExample, units: Sequence[Unit], batches: Batches, grid: Grid, clipping: Clipping
) -> tuple[list[Tensor], float | None]:
    """The exact sum of the units' contributions, and the mean loss of their rows."""
    total = ExactSum(of.parameters, grid, clipping)
    rows = 0
    losses = 0.0
    for gradients, looked_at in unit_gradients(of, units, batches):
        total.add(gradients)
        rows += sum(count for count, _ in looked_at)
        losses += sum(loss for _, loss in looked_at)
    return total.totals(), losses / rows if rows else None


def _assert_finite(parameters: Sequence[nn.Parameter]) -> None:
    if not all(bool(p.isfinite().all()) for p in parameters):
        raise PrivacyError(
            "the model is not finite any more after a step of DP-SGD: expected finite parameters; lower local.learning_rate, or"
            " look for records with extreme values"
        )


def check_clipping(
    module: nn.Module,
    loss: LossPerExample,
    *,
    batches: Batches,
    alone: Sequence[Batch],
    clip_norm: float,
    clipping: Clipping = "flat",
) -> float:
    """Relative error of the clipped sum over some rows against gradients taken one row at a time, by autograd.

    A model family for which Opacus is silently wrong (a parameter used outside its module's forward), a loss that mixes rows,
    and an architecture that mixes a row with its padding show here: callers refuse to train above a small threshold. Changes
    nothing in the module.

    Args:
        batches: As of `private_steps`, for the row numbers 0 … len(alone) − 1.
        alone: The same rows, each as a batch of one slot without padding.

    Returns:
        The largest error over three clip norms, relative to the norms of what is summed, which may cancel; infinity where a row
        has no gradient, as then nothing would be compared.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    with _in_reach(params, lambda: _norms_of(_gradients(loss, alone, params))):
        return _error_of_sums(module, loss, params, batches, alone, clip_norm, clipping)


@contextmanager
def _in_reach(params: Sequence[nn.Parameter], norms: Callable[[], list[float]]) -> Iterator[None]:
    """Shrink the parameters inside the block until no row is so sure of its class that its gradient vanishes.

    A state can be saturated, by training or by an attack: its losses are exactly 0, and say nothing about how gradients are
    made. Wiring does not depend on the state.
    """
    before = [p.detach().clone() for p in params]
    try:
        for _ in range(_SHRINKS):
            if min(norms()) > _VANISHED:
                break
            with torch.no_grad():
                for p in params:
                    p.mul_(_SHRINK)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)


def _gradients(loss: LossPerExample, alone: Sequence[Batch], params: Sequence[nn.Parameter]) -> list[tuple[Tensor, ...]]:
    return [torch.autograd.grad(loss(row).sum(), params) for row in alone]


def _norms_of(gradients: Sequence[tuple[Tensor, ...]]) -> list[float]:
    return [math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads)) for grads in gradients]


def _error_of_sums(
    module: nn.Module,
    loss: LossPerExample,
    params: Sequence[nn.Parameter],
    batches: Batches,
    alone: Sequence[Batch],
    clip_norm: float,
    clipping: Clipping,
) -> float:
    gradients = _gradients(loss, alone, params)
    norms = _norms_of(gradients)
    if not min(norms) > 0:
        return math.inf  # nothing to compare: the check would pass whatever Opacus did
    units = [[row] for row in range(len(alone))]
    entries = sum(p.numel() for p in params)
    errors = []
    with per_example(module, loss) as of:
        for clip in (clip_norm, min(norms) / 2, max(norms) * 2):  # all clipped, none clipped: each hides other mistakes
            actual, _ = _clipped_sum(of, units, batches, grid_of(clip, 0.0, entries), clipping)
            errors.append(_distance(actual, _expected_sum(gradients, clip, clipping)) / sum(min(clip, norm) for norm in norms))
    return max(errors)


def _expected_sum(gradients: list[tuple[Tensor, ...]], clip: float, clipping: Clipping) -> list[Tensor]:
    """The sum of each row's gradient, clipped by itself: as a whole, or every parameter's part to its share of the norm."""
    total = [torch.zeros_like(g, dtype=torch.float64) for g in gradients[0]]
    for grads in gradients:
        parts = [g.double() for g in grads]
        norms = [float(g.norm()) for g in parts]
        whole = math.sqrt(sum(norm**2 for norm in norms))
        for total_part, part, norm in zip(total, parts, norms, strict=True):
            bound = clip if clipping == "flat" else clip / math.sqrt(len(parts))
            size = whole if clipping == "flat" else norm
            total_part += part * min(1.0, bound / max(size, 1e-300))
    return total


def _distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """‖actual − expected‖."""
    return math.sqrt(sum(float((a.double() - e).pow(2).sum()) for a, e in zip(actual, expected, strict=True)))
