"""The lower bounds against theorems, an independent library and simulated mechanisms whose ε is known."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from scipy import stats

from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.tradeoff import trade_off
from cotune.privacy.auditing.lower_bounds import (
    Evidence,
    Guess,
    build_perfect_evidence,
    evidence,
    import_auditing,
    lower_bound_any,
    lower_bound_steps,
)
from tests.support.failures import fails_with
from tests.support.sums_of_steps import sums_of_steps

DELTA = 1e-5
CERTAIN = 1e-8  # allowed error: a test that fails is no bad luck


def gaussian(targets: int, mu: float, seed: int = 0) -> Evidence:
    """Scores of the Gaussian mechanism: N(μ, 1) when in, N(0, 1) when out."""
    rng = np.random.default_rng(seed)
    present = rng.random(targets) < 0.5
    return evidence(rng.normal(size=targets) + mu * present, present, rng)


# --- guesses


def test_the_surest_guesses_are_counted_by_hand() -> None:
    scores = np.arange(32.0)
    present = scores >= 16
    present[[0, 31]] = [True, False]  # the two surest are wrong
    found = evidence(scores, present, np.random.default_rng(0))
    assert found.guesses == (Guess(32, 30), Guess(16, 14))
    assert found.targets == 32
    assert found.auc == pytest.approx(15 * 15 / (16 * 16))


def test_numbers_of_guesses_are_fixed_beforehand() -> None:
    assert [g.count for g in gaussian(1000, 1.0).guesses] == [g.count for g in gaussian(1000, 0.0, 1).guesses]
    assert [g.count for g in gaussian(1000, 1.0).guesses] == [1000, 500, 250, 125, 62, 31]


def test_equal_scores_are_no_evidence() -> None:
    """Ordered as given, they would be: here all that are in come last."""
    present = np.arange(4000) >= 2000
    found = evidence(np.zeros(4000), present, np.random.default_rng(0))
    low, high = stats.hypergeom.ppf([1e-9, 1 - 1e-9], 4000, 2000, 2000)
    assert 2 * low <= found.guesses[0].right <= 2 * high


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with fails_with("privacy.audit_not_finite"):
        evidence(np.array([bad] * 40), np.arange(40) % 2 == 0, np.random.default_rng(0))


@pytest.mark.parametrize(("targets", "share"), [(40, 0.0), (40, 1.0), (10, 0.5)])
def test_coins_that_show_nothing_are_refused(targets: int, share: float) -> None:
    present = np.arange(targets) < share * targets
    with fails_with("privacy.audit_too_small", str(targets), str(present.sum())):
        evidence(np.arange(float(targets)), present, np.random.default_rng(0))


# --- any mechanism


def theorem_5_2(targets: int, guess: Guess, eps: float, delta: float) -> float:
    """The probability of so many right guesses under (ε, δ)-DP, at most: written down from the paper, sum by sum."""
    p = 1 / (1 + math.exp(-eps))
    mass = [math.comb(guess.count, k) * p**k * (1 - p) ** (guess.count - k) for k in range(guess.count + 1)]
    tail = [sum(mass[max(v, 0) :]) for v in range(guess.count + 1)]
    at = tail[guess.right]
    slope = max((tail[guess.right - i] - at) / i for i in range(1, guess.right + 1))
    return min(1.0, at + 2 * targets * delta * slope)


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-3])
@pytest.mark.parametrize(("count", "right"), [(40, 38), (100, 80), (64, 64)])
def test_the_bound_is_where_theorem_5_2_stops_refuting(delta: float, count: int, right: int) -> None:
    guess = Guess(count, right)
    bound = lower_bound_any(Evidence(400, (guess,), 0.5), delta, 0.05)
    assert bound > 0.3
    assert theorem_5_2(400, guess, bound - 1e-3, delta) < 0.05 < theorem_5_2(400, guess, bound + 1e-3, delta)


@pytest.mark.parametrize(("count", "right"), [(64, 0), (64, 32), (64, 10)])
def test_no_bound_from_guesses_that_are_not_better_than_chance(count: int, right: int) -> None:
    found = Evidence(400, (Guess(count, right),), 0.5)
    assert lower_bound_any(found, DELTA, 0.05) == 0.0
    assert lower_bound_steps(found, [Steps(1.0, 1.0, 1)], DELTA, 0.05) == 0.0


def test_a_perfect_attack_is_counted_with_one_mistake() -> None:
    assert build_perfect_evidence(400).guesses == tuple(Guess(n, n) for n in (400, 200, 100, 50, 25))
    perfect = lower_bound_any(Evidence(400, (Guess(400, 400),), 1.0), DELTA, 0.05)
    assert perfect == lower_bound_any(Evidence(400, (Guess(400, 399),), 1.0), DELTA, 0.05) > 2


def test_randomized_response_stays_under_its_epsilon() -> None:
    """The worst mechanism for pure ε: an answer that is right with probability e^ε / (1 + e^ε)."""
    rng = np.random.default_rng(0)
    for eps in (0.5, 1.0, 3.0):
        present = rng.random(40_000) < 0.5
        truthful = rng.random(40_000) < 1 / (1 + math.exp(-eps))
        found = evidence((present == truthful).astype(float), present, rng)
        assert 0.6 * eps < lower_bound_any(found, 1e-15, CERTAIN) <= eps


# --- these steps


def test_one_gaussian_step_has_the_gdp_curve() -> None:
    curve = trade_off([Steps(0.8, 1.0, 1)])
    for alpha in (1e-6, 1e-3, 0.1, 0.5, 0.9, 1.0):
        exact = stats.norm.cdf(stats.norm.ppf(1 - alpha) - 1 / 0.8)
        assert exact - 5e-3 <= curve(alpha) <= exact + 1e-12


@pytest.mark.parametrize(("targets", "mu"), [(1000, 1.0), (2000, 0.4), (500, 3.0)])
def test_for_one_gaussian_step_the_bound_is_that_of_jax_privacy(targets: int, mu: float) -> None:
    found = gaussian(targets, mu)
    guess = found.guesses[1]
    library = import_auditing()._epsilon_one_run_fdp(0, targets, guess.count, guess.right, 0.05, DELTA)
    ours = lower_bound_steps(Evidence(targets, (guess,), 0.5), [Steps(1 / mu, 1.0, 1)], DELTA, 0.05)
    assert library > 0.1
    assert ours == pytest.approx(library, rel=0.02)
    assert ours <= library * 1.003


@pytest.mark.parametrize("steps", [Steps(1.0, 1.0, 1), Steps(2.0, 0.05, 100), Steps(4.0, 0.3, 60)])
def test_honest_mechanism_stays_under_its_claim(steps: Steps) -> None:
    """Sampled Gaussian sums as a canary sees them, honestly and with an eighth of the noise."""
    rng = np.random.default_rng(1)
    present, sums = sums_of_steps(steps, 20_000, rng)
    found = evidence(sums.sum(axis=0), present, rng)
    claim = epsilon([steps], DELTA)
    bound = lower_bound_steps(found, [steps], DELTA, CERTAIN)
    assert 0.05 * claim < bound <= claim
    assert lower_bound_any(found, DELTA, CERTAIN) <= claim
    present, sums = sums_of_steps(steps, 20_000, rng, noise=1 / 8)
    with_less = evidence(sums.sum(axis=0), present, rng)
    assert lower_bound_steps(with_less, [steps], DELTA, CERTAIN) > claim


def test_zero_noise_gives_the_least_accounted_noise() -> None:
    scores = np.arange(2000.0)
    found = evidence(scores, scores >= 1000, np.random.default_rng(0))
    assert lower_bound_steps(found, [Steps(2.0, 0.001, 1)], DELTA, 0.05) == pytest.approx(
        epsilon([Steps(0.3, 0.001, 1)], DELTA), rel=1e-9
    )


def test_less_allowed_error_is_a_smaller_bound() -> None:
    found = gaussian(1000, 1.0)
    steps = [Steps(1.0, 1.0, 1)]
    bounds = [(lower_bound_any(found, DELTA, e), lower_bound_steps(found, steps, DELTA, e)) for e in (0.3, 0.05, 0.001)]
    assert bounds == sorted(bounds, reverse=True)
    assert all(any_ < these for any_, these in bounds)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    with fails_with("privacy.audit_package_missing", "jax_privacy", "cotune[audit]"):
        import_auditing()
