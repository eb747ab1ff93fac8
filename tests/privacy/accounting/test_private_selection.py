from __future__ import annotations

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.filters import renyi
from cotune.privacy.accounting.private_selection import draw_repetitions, selection_epsilon
from tests.support.failures import fails_with

ORDERS = [1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64]


@pytest.mark.parametrize("mean", [1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("steps", [Steps(2.0, 1.0, 3), Steps(1.0, 0.1, 50)])
def test_it_is_the_epsilon_of_dp_accounting(steps: Steps, mean: float) -> None:
    orders = [order for order in ORDERS if steps.sample_rate == 1 or order == int(order)]
    accountant = RdpAccountant(orders=orders)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(steps.event(), mean, 1))
    found = selection_epsilon({order: renyi([steps], order) for order in orders}, mean, 1e-5)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


def test_repetitions_have_their_mean_and_are_never_none() -> None:
    generator = np.random.default_rng(0)
    drawn = [draw_repetitions(4.0, generator) for _ in range(20_000)]
    assert min(drawn) == 1
    assert np.mean(drawn) == pytest.approx(4.0, abs=0.12)
    assert draw_repetitions(1.0, generator) == 1


@pytest.mark.parametrize("mean", [0.5, float("nan"), float("inf")])
def test_a_mean_that_is_none(mean: float) -> None:
    with fails_with("privacy.invalid_repetitions", "1"):
        selection_epsilon({2.0: 0.1}, mean, 1e-5)


# --- against the exact output of a mechanism, computed without any accountant


def exact_delta(sigma: float, mean: float, eps: float) -> float:
    """δ at ε of "the best of a geometric number of Gaussian outputs", for sensitivity 1 and the worse of both directions.

    The output of one run is N(0, σ²) or N(1, σ²), and the largest is chosen. With K geometric, P(best ≤ y) = γF(y) / (1 - (1 -
    γ)F(y)), γ = 1/mean; the probabilities of narrow cells follow, and δ is Σ max(0, P - e^ε·Q) over them.
    """
    edges = np.linspace(-14 * sigma, 1 + 14 * sigma, 400_001)

    def best(shift: float) -> np.ndarray:
        below = stats.norm.cdf(edges, loc=shift, scale=sigma)
        return np.diff(below / mean / (1 - (1 - 1 / mean) * below))

    one = best(0.0)
    other = best(1.0)
    return float(max(np.maximum(p - np.exp(eps) * q, 0).sum() for p, q in ((one, other), (other, one))))


@pytest.mark.parametrize("mean", [2.0, 10.0, 50.0])
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_best_gaussian_selection_costs_at_most_its_bound(sigma: float, mean: float) -> None:
    delta = 1e-5
    stated = selection_epsilon({order: renyi([Steps(sigma, 1.0, 1)], order) for order in range(2, 128)}, mean, delta)
    assert exact_delta(sigma, mean, stated) <= delta
    assert exact_delta(sigma, mean, epsilon([Steps(sigma, 1.0, 1)], delta)) > delta, "a choice costs more than one run"


def test_selection_cost_is_monotone() -> None:
    curve = {order: renyi([Steps(1.5, 0.2, 40)], order) for order in range(2, 64)}
    larger = {order: 1.1 * value for order, value in curve.items()}
    by_mean = [selection_epsilon(curve, mean, 1e-5) for mean in (1, 2, 5, 10, 100)]
    by_delta = [selection_epsilon(curve, 5, delta) for delta in (1e-3, 1e-5, 1e-8)]
    assert by_mean == sorted(set(by_mean))
    assert by_delta == sorted(set(by_delta))
    assert selection_epsilon(larger, 5, 1e-5) > selection_epsilon(curve, 5, 1e-5)
