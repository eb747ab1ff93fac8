"""What dp-accounting computes number by number in Python, for whole arrays: the same formulas, the same order, the same digits.

The method and its bounds are dp-accounting's ("Connect the Dots", Doroshenko et al., PETS 2022,
https://arxiv.org/abs/2207.04380). For some ten thousand points it asks for the inverse of the privacy loss, and adds up the
tails of a distribution, one after the other; for the range of a composition it takes 40 logarithms of sums of exponentials.
Tests compare every digit with dp-accounting's own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf, PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy import fft

Curve = np.ndarray[Any, np.dtype[np.float64]]
_MOST_ROUNDING = 1e-12
_TAIL = 1e-15  # mass that a composition may cut off, and counts as an infinite loss: dp-accounting's default
_MOST_SPARSE = 1000  # points of a distribution that is kept, and composed, as a dictionary: dp-accounting's
_ORDERS = 20  # of the moments, on either side of zero, that bound the tails: dp-accounting's


def discretize_gaussian(sigma: float, rate: float, width: float) -> PrivacyLossDistribution:
    """Return the distribution of the privacy loss of one step, rounded up: that of dp-accounting's `from_gaussian_mechanism`.

    Args:
        sigma: Noise standard deviation / clip norm.
        rate: q, the probability with which each record is drawn, in (0, 1].
        width: Of the grid of privacy losses.

    Raises:
        ValueError: For σ ≤ 0 or q outside of (0, 1].
    """
    removed = _pmf(_ArrayGaussianLoss(sigma, sampling_prob=rate, adjacency_type=AdjacencyType.REMOVE), width)
    if rate == 1:
        return PrivacyLossDistribution(removed)  # the two neighbors look the same
    added = _pmf(_ArrayGaussianLoss(sigma, sampling_prob=rate, adjacency_type=AdjacencyType.ADD), width)
    return PrivacyLossDistribution(removed, added)


def self_compose(distribution: PrivacyLossDistribution, count: int) -> PrivacyLossDistribution:
    """Return the distribution of as many equal steps, at least one: that of dp-accounting's `self_compose`."""
    removed = _self_compose(distribution._pmf_remove, count)
    if distribution._symmetric:
        return PrivacyLossDistribution(removed)
    return PrivacyLossDistribution(removed, _self_compose(distribution._pmf_add, count))


def _self_compose(pmf: PLDPmf, count: int) -> PLDPmf:
    if count < 1 or (not isinstance(pmf, DensePLDPmf) and (count == 1 or pmf.size**count <= _MOST_SPARSE)):
        return pmf.self_compose(count, _TAIL)  # of few points, one by one
    pmf = pmf.to_dense_pmf()
    lowest, highest = _find_range(pmf._probs, count)
    size = highest - lowest + 1
    length = fft.next_fast_len(max(size, pmf.size))
    wrapped = np.real(fft.ifft(fft.fft(pmf._probs, length) ** count))
    infinite = _TAIL - math.expm1(count * math.log1p(-pmf._infinity_mass))
    lower_loss = pmf._lower_loss * count + lowest
    probs = np.roll(wrapped, -lowest)[:size]
    return DensePLDPmf(pmf._discretization, lower_loss, probs, infinite, pmf._pessimistic_estimate)


def _find_range(probs: Curve, count: int) -> tuple[int, int]:
    """Return the points of a composition outside of which Chernoff's bound leaves at most the mass of the cut tails.

    The orders are ±k/n for n points. So the exponentials of one order are those of the order before times e^(i/n), and stay
    below e^20.
    """
    lowest = 0
    highest = (len(probs) - 1) * count
    steps = np.arange(len(probs)) / len(probs)
    for sign in (-1, 1):
        factors = np.exp(sign * steps)
        weighted = probs
        for k in range(1, _ORDERS + 1):
            weighted = weighted * factors
            with np.errstate(divide="ignore"):
                exponent = count * np.log(weighted.sum()) + math.log(2 / _TAIL)
            bound = exponent / (sign * (k / len(probs)))
            if not math.isfinite(bound):
                continue
            if sign > 0:
                highest = min(highest, math.ceil(bound))
            else:
                lowest = max(lowest, math.floor(bound))
    return lowest, highest


def find_deltas(distribution: PrivacyLossDistribution, epsilons: Curve) -> Curve:
    """Return δ at each finite ε: that of dp-accounting's `get_delta_for_epsilon` for a list."""
    removed = _find_deltas(distribution._pmf_remove.to_dense_pmf(), epsilons)
    if distribution._symmetric:
        return removed
    worse: Curve = np.maximum(removed, _find_deltas(distribution._pmf_add.to_dense_pmf(), epsilons))
    return worse


def _find_deltas(pmf: DensePLDPmf, epsilons: Curve) -> Curve:
    losses = (np.arange(pmf.size) + pmf._lower_loss) * pmf._discretization
    above = pmf.size - np.searchsorted(losses, epsilons, side="right")  # how many losses are larger than each ε
    upper = np.cumsum(np.append(pmf._infinity_mass, pmf._probs[::-1]))[above]
    lower = np.cumsum(np.append(0.0, (pmf._probs * np.exp(-losses))[::-1]))[above]
    found: Curve = upper - np.exp(epsilons) * lower
    return found


def find_epsilon(distribution: PrivacyLossDistribution, delta: float) -> float:
    """Return the least ε ≥ 0 at δ, infinity where there is none: that of dp-accounting's `get_epsilon_for_delta`."""
    removed = _find_epsilon(distribution._pmf_remove, delta)
    return removed if distribution._symmetric else max(removed, _find_epsilon(distribution._pmf_add, delta))


def _find_epsilon(pmf: PLDPmf, delta: float) -> float:
    """From the largest loss down, add up the mass above and the mass / e^loss, until together they meet δ above the next loss.

    The losses and sums are those of dp-accounting's loop, in its order; where ε is no ordinary number, the loop itself says so.
    """
    if not isinstance(pmf, DensePLDPmf) or pmf._infinity_mass > delta:
        return float(pmf.get_epsilon_for_delta(delta))
    downwards = np.full(pmf.size, -pmf._discretization)
    downwards[0] = (pmf._lower_loss + pmf.size - 1) * pmf._discretization
    losses = np.cumsum(downwards)
    losses = losses[losses > 0]
    probs = pmf._probs[::-1][: len(losses)]
    upper = np.cumsum(np.append(pmf._infinity_mass, probs))[:-1]
    lower = np.cumsum(np.append(0.0, np.fromiter(map(math.exp, -losses), np.float64, len(losses)) * probs))[:-1]
    meets = np.full(len(losses), -np.inf)
    known = (upper > delta) & (lower > 0)
    with np.errstate(over="ignore"):
        meets[known] = np.log((upper[known] - delta) / lower[known])
    [found] = np.nonzero(meets >= losses)
    if not len(found) or np.any((upper >= delta) & (lower == 0)):
        return float(pmf.get_epsilon_for_delta(delta))
    return math.log((upper[found[0]] - delta) / lower[found[0]])


def _pmf(loss: _ArrayGaussianLoss, width: float) -> PLDPmf:
    bounds = loss.connect_dots_bounds()
    lowest = math.floor(bounds.epsilon_lower / width)
    highest = math.ceil(bounds.epsilon_upper / width)
    deltas = loss.get_delta_for_epsilon(np.arange(lowest, highest + 1) * width)
    if len(deltas) <= _MOST_SPARSE:
        return create_pmf_pessimistic_connect_dots_fixed_gap(width, lowest, highest, deltas)
    return DensePLDPmf(width, lowest, _connect_dots(width, deltas), deltas.min(), True)


def _connect_dots(width: float, deltas: Curve) -> Curve:
    """Return the mass of each loss: that of `create_pmf_pessimistic_connect_dots_fixed_gap`, which puts it into a dictionary.

    Raises:
        ValueError: For δ that grow with ε by more than rounding.
    """
    if np.diff(deltas).max() > _MOST_ROUNDING:
        raise ValueError("deltas grow with ε: expected those of a privacy curve")
    steps = np.diff(np.minimum.accumulate(deltas))
    probs = np.zeros_like(deltas)
    probs[0] = 1 - deltas[0] + steps[0] / math.expm1(width)
    probs[1:-1] = (steps[1:] - steps[:-1] * math.exp(width)) / math.expm1(width)
    probs[-1] = steps[-1] / math.expm1(-width)
    mass: Curve = np.maximum(0.0, probs)
    return mass


class _ArrayGaussianLoss(GaussianPrivacyLoss):  # type: ignore[misc]  # dp-accounting has no types
    """The privacy loss of a Gaussian mechanism, whose hockey-stick divergence is computed for an array of ε at once."""

    def get_delta_for_epsilon(self, epsilon: Curve) -> Curve:
        """Return δ at each ε. Where no outcome has a privacy loss above ε, δ is 0 (added) or 1 - e^ε (removed)."""
        is_added = self.adjacency_type == AdjacencyType.ADD
        bound = math.log1p(-self.sampling_prob) if self.sampling_prob < 1 else -math.inf  # ± of every privacy loss
        reached = epsilon < -bound if is_added else epsilon > bound
        deltas = np.zeros_like(epsilon)
        if not is_added:
            deltas[~reached] = -np.expm1(epsilon[~reached])
        cutoffs = self._inverse(epsilon[reached], bound, -1.0 if is_added else 1.0)
        deltas[reached] = self.mu_upper_cdf(cutoffs) - np.exp(epsilon[reached] + self.mu_lower_log_cdf(cutoffs))
        bounded: Curve = np.clip(deltas, 0, 1)
        return bounded

    def _inverse(self, losses: Curve, bound: float, sign: float) -> Curve:
        """Return the largest outcomes whose privacy loss is at least each of `losses`; `sign` -1: of the record added."""
        unsampled = sign * self._without_sampling(sign * losses, bound)
        outcomes: Curve = -0.5 * self.sensitivity - unsampled * self._standard_deviation**2 / self.sensitivity
        return outcomes if sign > 0 else self.sensitivity + outcomes

    def _without_sampling(self, losses: Curve, bound: float) -> Curve:
        """Return log(1 + (e^loss - 1)/q), the privacy losses that there would be without sampling; -∞ at the bound."""
        if self.sampling_prob == 1:
            return losses
        odds = 1 / self.sampling_prob
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = losses + np.log(odds)
            found: Curve = scaled + np.log1p(-np.exp(np.log(odds - 1) - scaled))
        found[losses == 0] = np.log(odds + (1 - odds))
        found[np.isclose(losses, bound, rtol=1e-9, atol=0)] = -math.inf
        return found
