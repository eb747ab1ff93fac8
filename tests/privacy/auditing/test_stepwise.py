"""The tight audit against a brute-force count, closed forms, and simulated engines: honest ones are not accused, others are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.tradeoff import trade_off
from cotune.privacy.auditing.stepwise import (
    Errors,
    Separation,
    _error_rates,
    _right_at_least,
    log_likelihood_ratios,
    lower_bound_any,
    lower_bound_steps,
    perfect,
    refutes,
    separation,
)
from tests.support.failures import fails_with
from tests.support.sums_of_steps import sums_of_steps

DELTA = 1e-5
CERTAIN = 1e-8  # allowed error: a test that fails is no bad luck
ONE_STEP = Steps(0.6, 1.0, 1)  # ε = 8
SAMPLED = Steps(1.885, 0.2, 200)  # ε = 8, as `tweets`


def attacked(steps: Steps, targets: int, seed: int, noise: float = 1.0, sensitivity: float = 1.0) -> Separation:
    """Every step of the sampled Gaussian mechanism, seen from inside; noise: in units of what is claimed."""
    present, sums = sums_of_steps(steps, targets, np.random.default_rng(seed), noise=noise, sensitivity=sensitivity)
    scores = sum(log_likelihood_ratios(each, steps.noise_multiplier, steps.sample_rate) for each in sums)
    return separation(scores, present, epsilon([steps], DELTA))


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.9, 1.0])
def test_the_score_is_the_ratio_of_the_two_densities(rate: float) -> None:
    sigma = 0.8
    sums = np.linspace(-6, 7, 40)
    out = stats.norm.pdf(sums, 0, sigma)
    inside = (1 - rate) * out + rate * stats.norm.pdf(sums, 1, sigma)
    assert log_likelihood_ratios(sums, sigma, rate) == pytest.approx(np.log(inside / out), abs=1e-9)


def test_errors_are_counted_by_hand() -> None:
    scores = np.array([-1.0, 0.5, 3.0, 9.0])
    present = np.array([True, False, False, True])
    found = separation(scores, present, 8.0)
    assert found.errors[0] == Errors(2, 1)  # above 0
    assert found.errors[3] == Errors(0, 1)  # above 3: equal is not above
    assert _right_at_least(found, 0.1) == pytest.approx(stats.beta.ppf(0.1, 1, 4))
    assert len(found.errors) == 9
    assert (found.members, found.others) == (2, 2)
    assert perfect(found).errors[0] == Errors(0, 0)


def test_error_rates_are_those_of_clopper_and_pearson() -> None:
    found = Separation(50, 40, (Errors(3, 50), Errors(0, 5)), 0.5)
    each = 0.05 / 4
    (alpha, missed), (none, few) = _error_rates(found, 0.05)
    assert stats.binom.cdf(3, 40, alpha) == pytest.approx(each)
    assert missed == 1.0
    assert none == pytest.approx(1 - each ** (1 / 40))
    assert stats.binom.cdf(5, 50, few) == pytest.approx(each)


def test_general_bound_is_the_ratio_of_error_rates() -> None:
    found = Separation(10_000, 10_000, (Errors(10, 5000),), 0.9)
    ((alpha, missed),) = _error_rates(found, 0.05)
    assert lower_bound_any(found, DELTA, 0.1) == pytest.approx(math.log((1 - DELTA - missed) / alpha))
    assert lower_bound_any(Separation(100, 100, (Errors(50, 50),), 0.5), DELTA, 0.05) == 0.0


@pytest.mark.parametrize(
    ("steps", "targets"),
    [(ONE_STEP, 2000), (SAMPLED, 2000), (Steps(1.391, 1.0, 1), 2000), (Steps(3.731, 1.0, 1), 10_000)],
    ids=["full batch", "tweets", "full batch, ε = 3", "full batch, ε = 1"],
)
def test_at_least_sixty_percent_of_the_claim_are_shown(steps: Steps, targets: int) -> None:
    """Before, the final model alone showed 3.12 of 8."""
    claim = epsilon([steps], DELTA)
    bound = lower_bound_steps(attacked(steps, targets, 0), [steps], DELTA, 0.01)
    assert 0.6 * claim < bound <= claim


def test_a_tenth_of_the_noise_missing_is_seen() -> None:
    claim = epsilon([ONE_STEP], DELTA)
    assert lower_bound_steps(attacked(ONE_STEP, 40_000, 0, noise=0.9), [ONE_STEP], DELTA, CERTAIN) > claim
    assert lower_bound_steps(attacked(ONE_STEP, 40_000, 0, sensitivity=1.12), [ONE_STEP], DELTA, CERTAIN) > claim
    assert lower_bound_steps(attacked(ONE_STEP, 40_000, 0), [ONE_STEP], DELTA, CERTAIN) <= claim


@pytest.mark.parametrize("steps", [ONE_STEP, Steps(1.2, 0.2, 10)])
def test_an_honest_engine_is_accused_as_rarely_as_stated(steps: Steps) -> None:
    """Of 200 audits with 70 % confidence at most 60 on average, and none by the certain bound for any mechanism."""
    curve = trade_off([steps])
    claim = epsilon([steps], DELTA)
    error = 0.3
    accused = 0
    for seed in range(200):
        found = attacked(steps, 1000, seed)
        accused += refutes(found, curve, error)
        assert lower_bound_any(found, DELTA, CERTAIN) <= claim
    assert accused <= stats.binom.isf(1e-9, 200, error)


def test_randomized_response_is_bounded_tightly() -> None:
    """The worst mechanism for pure ε: the test "in, if it says so" has α = β = 1/(1 + e^ε)."""
    rng = np.random.default_rng(0)
    for eps in (0.5, 1.0, 3.0):
        present = rng.random(40_000) < 0.5
        truthful = rng.random(40_000) < 1 / (1 + math.exp(-eps))
        found = separation(np.where(present == truthful, 1e-3, -1e-3), present, eps)
        assert 0.85 * eps - 0.05 < lower_bound_any(found, 0.0, CERTAIN) <= eps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with fails_with("privacy.audit_not_finite"):
        separation(np.array([bad, 0.0]), np.array([True, False]), 1.0)


@pytest.mark.parametrize("coins", [np.ones(9, bool), np.zeros(9, bool)])
def test_coins_that_fell_alike_are_refused(coins: np.ndarray) -> None:
    with fails_with("privacy.audit_too_small", "9"):
        separation(np.arange(9.0), coins, 1.0)
