"""Noise on a grid: the Gaussian mechanism for sums of quantized contributions, the geometric mechanism for integers.

The low bits of continuous noise in floating point reveal which sum it was added to (Mironov, "On Significance of the Least
Significant Bits for Differential Privacy", CCS 2012). Here nothing has low bits: every contribution is rounded to an integer
number of grid steps, integers are added exactly, and the noise, drawn in float64, is rounded to whole steps before it is added.
Released is round(S + z) = S + round(z) for a sum S of integers: post-processing of the exact Gaussian mechanism S + z. The
sensitivity is that of the quantized contributions; `choose_grid` keeps it within C.

What remains of floating point: z is a float64 and not a real number. A grid step is 2⁻²¹ to 2⁻²⁰ of the noise's standard
deviation, so that each step is hit by about 2³² of the sampler's values, whatever the sum. A discrete Gaussian (Canonne, Kamath,
Steinke, NeurIPS 2020) would remove that rest too, at the price of a rejection sampler in exact arithmetic for every coordinate
of every step.

The geometric mechanism adds noise of the discrete Laplace distribution to an integer; it is ε-private without any δ. It releases
the number of records, from which a run's sample rate, noise, steps and δ follow. A run that follows from an answer cannot be
composed with it as if it had been fixed before: where the answer makes a neighbor likelier, the noise that it leads to may be
smaller too. But every run that can follow is (ε₂, δ)-private by itself, and the answer is ε₁-private, whatever it is; so both
together are (ε₁ + ε₂, δ)-private (Dwork & Roth, "The Algorithmic Foundations of Differential Privacy", 2014, theorem B.1). A
Gaussian answer with the same standard deviation would need an ε₁ four times as large, and a δ of its own.

The mechanism is Ghosh, Roughgarden, Sundararajan, "Universally Utility-Maximizing Privacy Mechanisms", STOC 2009, section 2. Its
privacy loss is ε₁ or -ε₁ and nothing else, like that of randomized response, whose curves are used here.
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

    Rounding moves each of d entries by half a step at most, and the vector by step·√d/2.

    Raises:
        PrivacyError: For so many entries that rounding alone could take half of C.
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
    """Return the grid for contributions of `entries` numbers, clipped to C = clip_norm, with noise of σC.

    Raises:
        PrivacyError: As `quantized_clip_norm`.
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


def geometric_epsilon(noise_multiplier: float) -> float:
    """Return ε of a number that one unit changes by one at most, told with noise of this standard deviation.

    P(z) is proportional to exp(-ε·|z|) on the whole numbers, whose variance is 1 / (2·sinh²(ε/2)).
    """
    return 2 * math.asinh(1 / (math.sqrt(2) * noise_multiplier))


def randomized_response(epsilon: float) -> float:
    """Return the probability of the larger privacy loss, e^ε / (1 + e^ε): of every ε-private mechanism the worst case."""
    return 1 / (1 + math.exp(-epsilon))


def geometric_renyi(epsilon: float, order: float) -> float:
    """Return the Rényi divergence at an order α > 1, in nats (Mironov, CSF 2017, https://arxiv.org/abs/1702.07476, table 1)."""
    likelier = math.log(randomized_response(epsilon))
    rarer = likelier - epsilon
    return float(np.logaddexp(order * likelier + (1 - order) * rarer, order * rarer + (1 - order) * likelier)) / (order - 1)


def add_geometric_noise(number: int, noise_multiplier: float, generator: np.random.Generator) -> int:
    """Return the number plus the difference of two geometric ones, which is what the discrete Laplace distribution is.

    Args:
        number: What one unit of privacy changes by one at most.
        noise_multiplier: The noise's standard deviation.
        generator: A private one. It draws a geometric number from a float64 of 53 bits, so that tails rarer than 2⁻⁵³ are cut.
    """
    ended = -math.expm1(-geometric_epsilon(noise_multiplier))
    up, down = generator.geometric(ended, size=2).tolist()
    return int(number + up - down)
