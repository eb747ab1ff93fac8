"""What dp-accounting computes number by number in Python, for whole arrays: the same formulas, the same order, the same digits.

The method and its bounds are dp-accounting's ("Connect the Dots", Doroshenko et al., PETS 2022,
https://arxiv.org/abs/2207.04380). For some ten thousand points it asks for the inverse of the privacy loss, and adds up the
tails of a distribution, one after the other. A test compares every digit with dp-accounting's own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf, PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

Curve = np.ndarray[Any, np.dtype[np.float64]]


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


def _pmf(loss: _ArrayGaussianLoss, width: float) -> PLDPmf:
    bounds = loss.connect_dots_bounds()
    lowest = math.floor(bounds.epsilon_lower / width)
    highest = math.ceil(bounds.epsilon_upper / width)
    deltas = loss.get_delta_for_epsilon(np.arange(lowest, highest + 1) * width)
    return create_pmf_pessimistic_connect_dots_fixed_gap(width, lowest, highest, deltas)


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
