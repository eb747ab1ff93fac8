"""Noise on a grid: the Gaussian mechanism for sums of quantized contributions.

The low bits of continuous noise in floating point reveal which sum it was added to (Mironov, "On Significance of the Least
Significant Bits for Differential Privacy", CCS 2012). Here nothing has low bits: every contribution is rounded to an integer
number of grid steps, integers are added exactly, and the noise, drawn in float64, is rounded to whole steps before it is added.
Released is round(S + z) = S + round(z) for a sum S of integers: post-processing of the exact Gaussian mechanism S + z. The
sensitivity is that of the quantized contributions; `choose_grid` keeps it within C.

What remains of floating point: z is a float64 and not a real number. A grid step is 2⁻²¹ to 2⁻²⁰ of the noise's standard
deviation, so that each step is hit by about 2³² of the sampler's values, whatever the sum. A discrete Gaussian (Canonne, Kamath,
Steinke, NeurIPS 2020) would remove that rest too, at the price of a rejection sampler in exact arithmetic for every coordinate
of every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cotune.errors import PrivacyError

_FINENESS = 20  # a step is at most 2^-20 of the noise's standard deviation
_FINENESS_WITHOUT_NOISE = 44
_MIN_NOISE = 2.0**-4  # σ below which the grid no longer follows the noise: C / step then stays below 2^24, exact in float32
MAX_NOISE = 4.0  # σ above which it does not either: rounding stays small against C
_MARGIN = 1 - 2.0**-20  # of float32 arithmetic on contributions, whose relative error is below 2^-22


@dataclass(frozen=True)
class Grid:
    """The grid that contributions are rounded to.

    Attributes:
        step: Distance of neighboring grid points, a power of two, in units of the gradient.
        max_norm: C' ≤ C. A contribution of at most this L2 norm has, once quantized, a norm of at most C.
    """

    step: float
    max_norm: float


def grid_step(clip_norm: float, noise_multiplier: float) -> float:
    """Return the grid's step: the power of two at or below 2⁻²⁰·σC, for σ within [1/16, 4].

    Without noise, as in checks, 2⁻⁴⁴·C.
    """
    if not noise_multiplier:
        return float(2.0 ** (math.floor(math.log2(clip_norm)) - _FINENESS_WITHOUT_NOISE))
    followed = min(max(noise_multiplier, _MIN_NOISE), MAX_NOISE)
    return float(2.0 ** (math.floor(math.log2(followed * clip_norm)) - _FINENESS))


def quantized_clip_norm(clip_norm: float, noise_multiplier: float, entries: int) -> float:
    """Return C' ≤ C such that a vector of L2 norm C' has a norm of at most C after rounding to the grid.

    Rounding moves each of d entries by at most half a step, and the vector by at most step·√d/2.

    Args:
        clip_norm: C.
        noise_multiplier: σ, which determines the grid.
        entries: d.

    Raises:
        PrivacyError: If rounding this number of entries could use up half of C.
    """
    left = (clip_norm - grid_step(clip_norm, noise_multiplier) * math.sqrt(entries) / 2) * _MARGIN
    if not left > clip_norm / 2:
        raise PrivacyError(
            f"{entries} parameters with a noise multiplier of {noise_multiplier:g} leave no room for rounding below the clip norm"
            f" {clip_norm:g}: expected fewer trained parameters, or a larger batch with less noise",
            code="privacy.too_many_parameters",
        )
    return left


def choose_grid(clip_norm: float, noise_multiplier: float, entries: int) -> Grid:
    """Return the grid for clipped contributions with noise of standard deviation σC.

    Args:
        clip_norm: C.
        noise_multiplier: σ.
        entries: Numbers per contribution.

    Raises:
        PrivacyError: If there are too many entries (see `quantized_clip_norm`).
    """
    return Grid(grid_step(clip_norm, noise_multiplier), quantized_clip_norm(clip_norm, noise_multiplier, entries))


def add_gaussian_noise(total: Tensor, sensitivity: float, noise_multiplier: float, generator: np.random.Generator) -> Tensor:
    """Return round(total) + round(N(0, (σC)² I)), both to the grid of C = sensitivity and σ = noise_multiplier.

    A total whose contributions were quantized is on the grid already. Where they were not, each of the two totals that neighbors
    compare moves by step·√d/2 at most: clip to `quantized_clip_norm` of four times as many entries.

    Args:
        total: Any shape, float64: a sum, each term with an L2 norm of at most `sensitivity` once quantized.
        generator: Cryptographic, outside of tests.

    Returns:
        A new tensor of the same shape, device and dtype; every entry is a whole number of grid steps.
    """
    step = grid_step(sensitivity, noise_multiplier)
    drawn = generator.standard_normal(tuple(total.shape))
    noise = torch.from_numpy(np.asarray(drawn)).to(total.device).mul_(noise_multiplier * sensitivity / step).round_()
    return total.div(step).round_().add_(noise).mul_(step)
