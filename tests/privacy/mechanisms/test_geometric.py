from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.privacy.accounting.composition import Steps, calibrate, deltas, epsilon
from cotune.privacy.accounting.filters import check_accountants, epsilon_over_runs, renyi
from cotune.privacy.accounting.tradeoff import gaussian_mu, true_positive_rate
from cotune.privacy.mechanisms.geometric import add_geometric_noise, geometric_epsilon, geometric_renyi
from cotune.privacy.mechanisms.random_generators import seeded_generator

NUMBER = Steps(20.0, 1.0, 1, "geometric")
TRAINING = Steps(1.1, 0.05, 200)
DELTA = 1e-5


def distribution(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers, and how likely each is as noise: by definition, not by the sampler."""
    reach = int(60 * sigma)
    numbers = np.arange(-reach, reach + 1)
    weights = np.exp(-geometric_epsilon(sigma) * np.abs(numbers))
    return numbers, weights / weights.sum()


@pytest.mark.parametrize("sigma", [1.0, 3.0, 20.0])
def test_noise_has_the_charged_standard_deviation(sigma: float) -> None:
    numbers, likely = distribution(sigma)
    assert math.sqrt(np.sum(likely * numbers**2)) == pytest.approx(sigma, rel=1e-9)
    losses = np.log(likely[1:] / likely[:-1])
    assert np.abs(losses) == pytest.approx(geometric_epsilon(sigma))  # never more than ε, never less


@pytest.mark.parametrize("sigma", [1.0, 5.0])
def test_the_sampler_draws_from_that_distribution(sigma: float) -> None:
    generator = seeded_generator("geometric", str(sigma))
    drawn = np.array([add_geometric_noise(1000, sigma, generator) for _ in range(20_000)]) - 1000
    numbers, likely = distribution(sigma)
    for value in range(-3, 4):
        expected = likely[numbers == value].item()
        assert np.mean(drawn == value) == pytest.approx(expected, abs=5 * math.sqrt(expected / len(drawn)))
    assert drawn.std() == pytest.approx(sigma, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.floats(1.0, 30.0), st.integers(2, 64))
def test_renyi_divergence_is_that_of_two_neighboring_counts(sigma: float, order: int) -> None:
    _, likely = distribution(sigma)
    kept = likely > 1e-280
    here = np.log(likely[kept][1:])
    beside = np.log(likely[kept][:-1])
    expected = np.logaddexp.reduce(order * here - (order - 1) * beside) / (order - 1)
    assert geometric_renyi(geometric_epsilon(sigma), order) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_epsilon_of_the_count_is_added_to_the_composition() -> None:
    pure = geometric_epsilon(20.0)
    assert epsilon([NUMBER], DELTA) == epsilon([NUMBER], 1e-12) == pytest.approx(pure)
    assert epsilon([NUMBER, TRAINING, NUMBER], DELTA) == pytest.approx(2 * pure + epsilon([TRAINING], DELTA))
    assert renyi([NUMBER, TRAINING], 8) == pytest.approx(geometric_renyi(pure, 8) + renyi([TRAINING], 8))
    check_accountants([NUMBER, TRAINING], DELTA)


def test_noise_is_calibrated_to_what_the_number_leaves() -> None:
    planned = [(0.05, 200)]
    left = calibrate(planned, epsilon=2.0 - geometric_epsilon(20.0), delta=DELTA)
    assert calibrate(planned, epsilon=2.0, delta=DELTA, spent=[NUMBER]) == left


def test_the_whole_curve_is_on_or_above_that_of_fixed_parameters() -> None:
    """Where nothing depends on the answer, dp-accounting composes both; that is what our curve must come to, from above."""
    oracle = PLDAccountant(value_discretization_interval=1e-4)
    oracle.compose(dp_event.DiscreteLaplaceDpEvent(geometric_epsilon(20.0), 1))
    oracle.compose(TRAINING.event())
    at = [0.0, 0.01, 0.05, 0.3, 1.0, 3.0]
    found = deltas([NUMBER, TRAINING], at)
    expected = np.asarray(oracle.get_delta(at))
    assert (found >= expected * (1 - 1e-3)).all()
    assert found == pytest.approx(expected, rel=0.02)
    assert epsilon([NUMBER, TRAINING], DELTA) >= oracle.get_epsilon(DELTA)


def test_figures_of_attacks_count_it() -> None:
    assert gaussian_mu([TRAINING]) < gaussian_mu([NUMBER, TRAINING]) < gaussian_mu([TRAINING]) + 0.1
    assert 0.01 < true_positive_rate([NUMBER], 0.01) < 0.0108  # 0.01·e^ε
    assert true_positive_rate([TRAINING], 0.01) < true_positive_rate([NUMBER, TRAINING], 0.01)


def test_it_counts_over_runs() -> None:
    without = {"a": [TRAINING], "b": [TRAINING]}
    with_number = {"a": [NUMBER, TRAINING], "b": [NUMBER, TRAINING]}
    found, trained = (epsilon_over_runs(runs, 8.0, DELTA) for runs in (with_number, without))
    assert found == pytest.approx(trained + 2 * geometric_epsilon(20.0))  # outside of the filter, whose budget may follow from it


def test_it_is_never_sampled() -> None:
    assert NUMBER.is_possible
    assert not Steps(20.0, 0.5, 1, "geometric").is_possible
