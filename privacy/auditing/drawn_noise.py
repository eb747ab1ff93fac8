"""Is the noise that an engine draws what it claims: independent N(0, 1) entries, in units of σC?

Seen from inside, where no record has a gradient: each step then releases its noise and nothing else. A million draws show a
standard deviation that is 1 % too small, where attacks on canaries need a tenth of the noise to be missing. Tested are

- the variance, as a whole and of each parameter by itself (χ²): too little is a broken claim, too much only a waste;
- the shape (Kolmogorov and Smirnov);
- repetition: the correlation of the draws with themselves at every lag up to half of their number (Wiener and Khinchin, by FFT).
  The draws of two runs that began in the same state of every seeded generator lie one behind the other, so that noise that is
  used for two steps, two parameters, or again in a second run shows at one of the lags.

A grid of 2⁻²⁰ σC, to which noise is rounded, changes the variance by 2⁻⁴⁰/12 and the distribution by 2⁻²²: nothing shows here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import fft, stats

Array = np.ndarray[Any, np.dtype[Any]]
Run = Sequence[Array]  # for each parameter: (steps, entries), in units of σC

_TESTS = 4
_MAX_EXAMINED = 2**21  # draws of a run for shape and repetition; the variance is that of all


@dataclass(frozen=True)
class DrawnNoise:
    """Statistics of the drawn noise, and evidence against the claim.

    Attributes:
        draws: Number of draws.
        deviation: Standard deviation of all draws, in units of σC.
        at_most: An upper bound on it; the claim is refuted if it is below 1.
        faults: What refutes the claim; the probability of any false refutation is at most the allowed one.
    """

    draws: int
    deviation: float
    at_most: float
    faults: tuple[str, ...]


def examine(runs: Sequence[Run], error: float) -> DrawnNoise:
    """Test the draws of one run, or of two that began in the same state.

    Args:
        error: Probability, at most, with which an engine that draws as claimed is accused.
    """
    each = error / _TESTS
    squares = [sum(_square(run[i]) for run in runs) for i in range(len(runs[0]))]
    counts = [sum(run[i].size for run in runs) for i in range(len(runs[0]))]
    draws = sum(counts)
    at_most = _deviation_at_most(sum(squares), draws, each)
    faults = []
    if at_most < 1:
        faults.append(f"too little noise: {math.sqrt(sum(squares) / draws):.4f} of what is claimed")
    for number, (square, count) in enumerate(zip(squares, counts, strict=True), start=1):
        if _deviation_at_most(square, count, each / len(counts)) < 1:
            faults.append(f"too little noise for parameter {number}: {math.sqrt(square / count):.4f} of what is claimed")
    sample = np.concatenate([_in_order(run)[:_MAX_EXAMINED] for run in runs])
    if float(stats.kstest(sample, "norm", mode="asymp").pvalue) < each:
        faults.append("the noise is not normal")
    if (lag := _repetition(sample, each)) is not None:
        faults.append(f"the noise repeats itself after {lag} draws")
    return DrawnNoise(draws, math.sqrt(sum(squares) / draws), at_most, tuple(faults))


def _square(draws: Array) -> float:
    return float(np.square(draws, dtype=np.float64).sum())


def _in_order(run: Run) -> Array:
    """The draws of one run, step by step, in float64."""
    return np.concatenate([part.reshape(len(part), -1) for part in run], axis=1).ravel().astype(np.float64)


def _deviation_at_most(square: float, count: int, error: float) -> float:
    """An upper bound on the standard deviation of `count` draws with that sum of squares."""
    return math.sqrt(square / float(stats.chi2.ppf(error, count)))


def _repetition(draws: Array, error: float) -> int | None:
    """The lag at which the draws are most like themselves, where that is no chance.

    Σ_i z_i·z_{i+k} has mean 0 and variance n − k. Lags up to n/2, for which it is nearly normal.
    """
    count = len(draws)
    spectrum = fft.rfft(draws, fft.next_fast_len(2 * count, real=True))
    products = fft.irfft(np.square(np.abs(spectrum)), fft.next_fast_len(2 * count, real=True))[1 : count // 2 + 1]
    sizes = np.abs(products) / np.sqrt(count - np.arange(1, len(products) + 1))
    lag = int(sizes.argmax())
    limit = float(stats.norm.isf(error / (2 * len(products))))
    return lag + 1 if sizes[lag] > limit else None
