"""DP-SGD (Abadi et al., CCS 2016, algorithm 1): clip the gradient of each unit, add noise, take a step.

Contract of `DPSGD.run`: every step moves along (Σ_i Q(c_i) + round(σC·N(0, I))) / B, where i runs over a Poisson sample with rate
q of the units, c_i is the gradient of unit i's loss (the sum over its rows) over all trained parameters, clipped to the norm C,
and Q rounds it to the grid of `noise`, so that ‖Q(c_i)‖ ≤ C. σ is the noise multiplier and B the expected batch size, a public
number. Adding or removing a unit changes the sum by exactly Q(c_i): that is what the accounting assumes. An empty sample takes a
step too (noise only).

`DPSGDConfig` holds everything that this guarantee depends on; plan and accounting fix it. `DPSGDSetup` holds what is trained and
how it is computed: batch sizes, padding and memory limits change speed and rounding, never what a unit may contribute.
Per-example gradients are those of Opacus, and of linear layers our own.

Why no ghost clipping: it computes norms from products and lets autograd form the sum, in which a row whose positions nearly
cancel can leave rounding errors of 56,843 times the clip norm. Here every clipped gradient exists before it is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from cotune.errors import PrivacyError
from cotune.privacy.mechanisms.clipped_sum import ClippedSum
from cotune.privacy.mechanisms.exact_sum import ClippingMode
from cotune.privacy.mechanisms.grid_noise import add_gaussian_noise
from cotune.privacy.mechanisms.per_example import (
    MAX_HELD_ENTRIES,
    Batch,
    Batches,
    LossPerExample,
    PerExample,
    Unit,
    UnitGradients,
    per_example,
    unit_gradients,
)
from cotune.privacy.mechanisms.random_generators import PoissonSampler, private_generator

_MIN_CHECKED_NORM = 1e-4  # norm of a synthetic row's gradient below which the state says nothing about how gradients are computed
_SHRINK_FACTOR = 0.1
_MAX_SHRINKS = 6  # states of more than 1e4 are refused before


@dataclass(frozen=True)
class StepReport:
    """What one step looked like. For the organization itself only: the loss is a private quantity.

    Attributes:
        step: From 1 to `steps`.
        steps: How many steps the run takes.
        loss: Mean loss over the rows of the batch; None for an empty batch.
    """

    step: int
    steps: int
    loss: float | None


@dataclass(frozen=True)
class DPSGDConfig:
    """Everything that the privacy guarantee of a run depends on: fixed by the plan and the accounting, never by the data.

    Attributes:
        noise_multiplier: σ, noise standard deviation / clip norm; 0 only in tests and checks.
        clip_norm: C, bound on the L2 norm of a unit's contribution.
        sample_rate: q in (0, 1], the probability with which each unit enters a step.
        expected_batch: B, the public number that sums are divided by.
        steps: How many steps to take.
        clipping_mode: "flat" clips the gradient as a whole, "per_layer" each of L parameter tensors to C/√L.

    Raises:
        ValueError: For a value outside of its range.
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    expected_batch: float
    steps: int
    clipping_mode: ClippingMode = "flat"

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"expected a finite noise_multiplier >= 0, got {self.noise_multiplier}")
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"expected a finite clip_norm > 0, got {self.clip_norm}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"expected 0 < sample_rate <= 1, got {self.sample_rate}")
        if not 0 < self.expected_batch < math.inf:
            raise ValueError(f"expected a finite expected_batch > 0, got {self.expected_batch}")
        if self.steps < 0:
            raise ValueError(f"expected steps >= 0, got {self.steps}")
        if self.clipping_mode not in get_args(ClippingMode):
            raise ValueError(f"expected clipping_mode to be one of {get_args(ClippingMode)}, got {self.clipping_mode!r}")


Sums = tuple[list[Tensor], float | None]  # the exact sum of the units' contributions; the mean loss of their rows


def _at_once(work: Callable[[], Sums]) -> Sums:
    return work()


@dataclass(frozen=True)
class DPSGDSetup:
    """What a run trains, on which units, and how that is computed.

    Attributes:
        module: In train mode; its parameters with requires_grad are those of the optimizer.
        optimizer: Takes a step for each noised mean gradient.
        loss: A batch of b slots -> (b,) losses, each of one row alone.
        units: The row numbers of each unit that is protected as a whole; a row belongs to one unit.
        batches: Row numbers -> batches of fixed shapes (see `per_example.Batches`). Their size changes speed and memory only.
        max_held_entries: How many entries of summed unit gradients are held at a time (float32): a limit on memory only.
        fit: Calls what adds up a step's contributions, again from nothing where memory ran out, with smaller batches. The sample
            is the same every time, and noise is added to what is returned.
        noise_generator: Of the noise; None: a cryptographic one. For tests and audits only, no plan can reach it.
        sampling_generator: Of the Poisson samples; None: a cryptographic one. For tests only.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: LossPerExample
    units: Sequence[Unit]
    batches: Batches
    max_held_entries: int = MAX_HELD_ENTRIES
    fit: Callable[[Callable[[], Sums]], Sums] = _at_once
    noise_generator: np.random.Generator | None = None
    sampling_generator: np.random.Generator | None = None


class DPSGD:
    """DP-SGD with a fixed guarantee.

    Example:
        >>> config = DPSGDConfig(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.1, expected_batch=10.0, steps=5)
        >>> reports = DPSGD(config).run(setup)  # doctest: +SKIP
    """

    def __init__(self, config: DPSGDConfig) -> None:
        self.config = config

    def run(self, setup: DPSGDSetup) -> Iterator[StepReport]:
        """Take the steps one after the other, and yield a report after each.

        Leaving the iterator early leaves nothing on the module.

        Raises:
            PrivacyError: When the parameters are not finite after a step: better no update than a wrong one.
        """
        config = self.config
        with _Sums(setup, config) as sums:
            noise = setup.noise_generator or private_generator()
            samples = setup.sampling_generator or private_generator()
            sampler = PoissonSampler(len(setup.units), config.sample_rate, config.steps, samples)
            for step, sample in enumerate(sampler, start=1):
                totals, mean_loss = setup.fit(partial(sums.add_up, list(map(setup.units.__getitem__, sample))))
                self._set_gradients(sums.parameters, totals, noise)
                setup.optimizer.step()
                setup.optimizer.zero_grad()
                _check_finite(sums.parameters)
                yield StepReport(step, config.steps, mean_loss)

    def _set_gradients(self, parameters: Sequence[nn.Parameter], totals: Sequence[Tensor], noise: np.random.Generator) -> None:
        """Set each parameter's gradient to its noised sum, divided by the expected batch size."""
        for p, total in zip(parameters, totals, strict=True):
            noised = add_gaussian_noise(total, self.config.clip_norm, self.config.noise_multiplier, noise)
            p.grad = noised.div_(self.config.expected_batch).to(p.dtype)


class _Sums(ExitStack):
    """Sums of contributions, step by step. After one that failed half-way, nothing is left on the module until the next."""

    def __init__(self, setup: DPSGDSetup, config: DPSGDConfig) -> None:
        super().__init__()
        self.setup = setup
        self.config = config
        self.parameters = tuple(p for p in setup.module.parameters() if p.requires_grad)
        self._gradients: PerExample | None = None

    def add_up(self, units: Sequence[Unit]) -> Sums:
        """Return the sum of the contributions of some units, and the mean loss of their rows."""
        setup = self.setup
        config = self.config
        try:
            self._gradients = self._gradients or self.enter_context(per_example(setup.module, setup.loss))
            total = ClippedSum(self.parameters, config.clip_norm, config.noise_multiplier, config.clipping_mode)
            return _add_up(total, unit_gradients(self._gradients, units, setup.batches, setup.max_held_entries))
        except BaseException:
            self._gradients = None
            self.close()
            raise


def clipped_sum(setup: DPSGDSetup, config: DPSGDConfig, units: Sequence[Unit]) -> Sums:
    """Return the exact sum of what some units contribute to a step, without noise: it must not leave the organization.

    Args:
        setup: The model and its records.
        config: Clip norm and clipping mode; σ only decides how contributions are rounded.
        units: The row numbers of each unit.
    """
    with _Sums(setup, config) as sums:
        return sums.add_up(units)


def _add_up(total: ClippedSum, blocks: Iterable[UnitGradients]) -> Sums:
    """Return the exact sum of the units' contributions, and the mean loss of their rows."""
    rows = 0
    losses = 0.0
    for gradients, batch_losses in blocks:
        total.add(gradients)
        rows += sum(count for count, _ in batch_losses)
        losses += sum(loss for _, loss in batch_losses)
    return total.totals(), losses / rows if rows else None


def _check_finite(parameters: Sequence[nn.Parameter]) -> None:
    if not all(bool(p.isfinite().all()) for p in parameters):
        raise PrivacyError(
            "the model is not finite any more after a step of DP-SGD: expected finite parameters; lower local.learning_rate, or"
            " look for records with extreme values",
            code="privacy.not_finite",
        )


def check_clipping(
    module: nn.Module,
    loss: LossPerExample,
    *,
    batches: Batches,
    alone: Sequence[Batch],
    clip_norm: float,
    clipping_mode: ClippingMode = "flat",
) -> float:
    """Return the relative error of the clipped sum over some rows against gradients taken one row at a time, by autograd.

    A model family for which Opacus is silently wrong (a parameter used outside its module's forward), a loss that mixes rows,
    and an architecture that mixes a row with its padding show here: callers refuse to train above a small threshold. The module
    is left unchanged.

    Args:
        module: In train mode, with the parameters to train.
        loss: As of `DPSGDSetup`.
        batches: As of `DPSGDSetup`, for the row numbers 0 … len(alone) − 1.
        alone: The same rows, each as a batch of one slot without padding.
        clip_norm: C of the training; two other norms, from the gradients themselves, are checked too.
        clipping_mode: As of `DPSGDConfig`.

    Returns:
        The largest error over three clip norms, relative to the norms of what is summed, which may cancel; infinity where a row
        has no gradient, as then nothing would be compared.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    with _unsaturated(params, lambda: _norms(_gradients(loss, alone, params))):
        expected = _gradients(loss, alone, params)
        if not min(_norms(expected)) > 0:
            return math.inf  # nothing to compare: the check would pass whatever Opacus did
        with per_example(module, loss) as gradients:
            return _max_relative_error(gradients, batches, expected, clip_norm, clipping_mode)


@contextmanager
def _unsaturated(params: Sequence[nn.Parameter], norms: Callable[[], list[float]]) -> Iterator[None]:
    """Shrink the parameters inside the block until no row is so sure of its class that its gradient vanishes.

    A state can be saturated, by training or by an attack: its losses are exactly 0 and say nothing about how gradients are
    computed. How gradients are wired does not depend on the state.
    """
    before = [p.detach().clone() for p in params]
    try:
        for _ in range(_MAX_SHRINKS):
            if min(norms()) > _MIN_CHECKED_NORM:
                break
            with torch.no_grad():
                for p in params:
                    p.mul_(_SHRINK_FACTOR)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)


def _gradients(loss: LossPerExample, alone: Sequence[Batch], params: Sequence[nn.Parameter]) -> list[tuple[Tensor, ...]]:
    return [torch.autograd.grad(loss(row).sum(), params) for row in alone]


def _norms(gradients: Sequence[tuple[Tensor, ...]]) -> list[float]:
    return [math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads)) for grads in gradients]


def _max_relative_error(
    gradients: PerExample,
    batches: Batches,
    expected: Sequence[tuple[Tensor, ...]],
    clip_norm: float,
    clipping_mode: ClippingMode,
) -> float:
    """Compare the clipped sums for three clip norms with those of the expected gradients, one tuple for each row."""
    norms = _norms(expected)
    units = [[row] for row in range(len(expected))]
    errors = []
    for clip in (
        clip_norm,
        min(norms) / 2,
        max(norms) * 2,
    ):  # as in training, all clipped, none clipped: each finds other mistakes
        blocks = unit_gradients(gradients, units, batches)
        actual, _ = _add_up(ClippedSum(gradients.parameters, clip, 0.0, clipping_mode), blocks)
        error = _distance(actual, _expected_sum(expected, clip, clipping_mode))
        errors.append(error / sum(min(clip, norm) for norm in norms))
    return max(errors)


def _expected_sum(gradients: Sequence[tuple[Tensor, ...]], clip: float, clipping_mode: ClippingMode) -> list[Tensor]:
    """Return the sum of the rows' gradients, each clipped as a whole, or every parameter's part to its share of the norm."""
    total = [torch.zeros_like(g, dtype=torch.float64) for g in gradients[0]]
    for grads in gradients:
        parts = [g.double() for g in grads]
        norms = [float(g.norm()) for g in parts]
        whole = math.sqrt(sum(norm**2 for norm in norms))
        for total_part, part, norm in zip(total, parts, norms, strict=True):
            bound = clip if clipping_mode == "flat" else clip / math.sqrt(len(parts))
            size = whole if clipping_mode == "flat" else norm
            total_part += part * min(1.0, bound / max(size, 1e-300))
    return total


def _distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return ‖actual − expected‖."""
    return math.sqrt(sum(float((a.double() - e).pow(2).sum()) for a, e in zip(actual, expected, strict=True)))
