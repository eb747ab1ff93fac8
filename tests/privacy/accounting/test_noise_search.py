"""The search for σ: what it finds does not depend on where it begins, and it composes few distributions."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from cotune.privacy.accounting.composition import (
    MAX_NOISE_MULTIPLIER,
    MIN_NOISE_MULTIPLIER,
    Steps,
    _epsilon,
    calibrate,
    epsilon,
)
from cotune.privacy.accounting.noise_search import bracket_root, estimate_noise
from tests.support.failures import fails_with

BOUNDS = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)


@given(
    root=st.floats(-3.0, 9.0),
    start=st.floats(-20.0, 20.0) | st.just(math.inf),
    power=st.floats(1.0, 3.0),
    target=st.floats(1e-3, 100.0),
)
def test_a_bracket_holds_the_root_if_there_is_one(root: float, start: float, power: float, target: float) -> None:
    def gap(x: float) -> float:
        ratio = power * (root - x)
        return math.inf if ratio > 50 else target * math.expm1(ratio)

    found = bracket_root(gap, start, BOUNDS, target)
    if found is None:
        assert gap(BOUNDS[0]) <= 0 or gap(BOUNDS[1]) > 0
        return
    low, high = found
    assert BOUNDS[0] <= low < high <= BOUNDS[1]
    assert gap(low) > 0 >= gap(high)


@settings(max_examples=2, deadline=None)  # each composes some thirty distributions
@given(target=st.floats(0.3, 20.0), q=st.floats(0.005, 1.0), count=st.integers(1, 300), delta=st.sampled_from([1e-3, 1e-6]))
def test_noise_is_that_of_a_search_over_the_whole_range(target: float, q: float, count: int, delta: float) -> None:
    def gap(x: float) -> float:
        return epsilon([Steps(math.exp(x), q, count)], delta) - target

    least = 0.6 * math.sqrt(count) if q == 1 else 0.6
    assume(gap(math.log(least)) > 0 > gap(BOUNDS[1]))
    expected = math.exp(brentq(gap, math.log(least), BOUNDS[1], xtol=1e-5))
    assert expected * (1 - 2e-5) <= calibrate([(q, count)], epsilon=target, delta=delta) <= expected * 1.0011


@pytest.mark.parametrize(("q", "count", "target"), [(0.1, 150, 8.0), (0.02, 500, 3.0), (1.0, 40, 2.0), (0.05, 60, 1.0)])
def test_few_distributions_are_composed(q: float, count: int, target: float) -> None:
    before = _epsilon.cache_info().misses
    calibrate([(q, count)], epsilon=target, delta=1.1e-5)
    assert 2 <= _epsilon.cache_info().misses - before <= 9


def test_without_steps_the_least_noise_suffices_unless_all_is_spent() -> None:
    assert calibrate([(0.1, 0)], epsilon=1.0, delta=1e-5) == calibrate([], epsilon=1.0, delta=1e-5) == MIN_NOISE_MULTIPLIER
    with fails_with("privacy.epsilon_unreachable"):
        calibrate([], epsilon=1.0, delta=1e-5, spent=[Steps(0.8, 0.1, 100)])


def test_no_estimate_is_no_noise() -> None:
    assert estimate_noise([(0.1, 10)], 0.0, 1e-5) == math.inf
    assert estimate_noise([], 1.0, 1e-5) == 0.0
    assert estimate_noise([(1.0, 4)], 1e9, 1e-5) < estimate_noise([(1.0, 4)], 1.0, 1e-5)
