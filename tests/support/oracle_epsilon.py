"""ε by dp-accounting alone, to compare the product's with. Discretizing a mechanism takes its time, and is done once for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache, reduce

from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism

from cotune.privacy.accounting.composition import Steps


def oracle_epsilon(spent: Iterable[Steps], delta: float, width: float = 2e-4) -> float:
    """Return ε of Gaussian steps, at least one. width: of the grid of privacy losses; the product's is 5e-4."""
    counts = Counter[tuple[float, float]]()
    for steps in spent:
        counts[steps.noise_multiplier, steps.sample_rate] += steps.count
    each = [_one_step(sigma, rate, width).self_compose(count) for (sigma, rate), count in counts.items()]
    composed = reduce(lambda one, other: one.compose(other), each)
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=32)
def _one_step(sigma: float, rate: float, width: float) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(sigma, value_discretization_interval=width, sampling_prob=rate)
