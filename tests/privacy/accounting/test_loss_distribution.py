from __future__ import annotations

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cotune.privacy.accounting.loss_distribution import discretize_gaussian, find_deltas, find_epsilon, self_compose

EPSILONS = [-3.0, -0.1, 0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 8.0, 30.0]
DELTAS = [1e-10, 1e-8, 1e-5, 1e-3]


@settings(max_examples=12, deadline=None)
@given(
    sigma=st.floats(0.7, 1000.0),
    rate=st.one_of(st.just(1.0), st.floats(1e-4, 1.0)),
    width=st.sampled_from([5e-4, 2e-3]),
)
def test_every_digit_is_that_of_dp_accounting(sigma: float, rate: float, width: float) -> None:
    own = discretize_gaussian(sigma, rate, width)
    theirs = from_gaussian_mechanism(sigma, value_discretization_interval=width, sampling_prob=rate)
    for one, other in ((own._pmf_remove, theirs._pmf_remove), (own._pmf_add, theirs._pmf_add)):
        dense = one.to_dense_pmf()
        expected = other.to_dense_pmf()
        assert dense._lower_loss == expected._lower_loss
        assert dense._infinity_mass == expected._infinity_mass
        np.testing.assert_array_equal(dense._probs, expected._probs)
    np.testing.assert_array_equal(own.get_delta_for_epsilon(EPSILONS), theirs.get_delta_for_epsilon(EPSILONS))


@settings(max_examples=12, deadline=None)
@given(
    sigma=st.floats(0.7, 1000.0),
    rate=st.one_of(st.just(1.0), st.floats(1e-4, 1.0)),
    count=st.one_of(st.integers(1, 3), st.integers(1, 20_000)),
    width=st.sampled_from([5e-4, 2e-3, 0.5]),
)
@example(sigma=1.0, rate=0.5, count=2, width=0.5)
@example(sigma=1.0, rate=0.5, count=3, width=0.5)
def test_equal_steps_compose_as_in_dp_accounting(sigma: float, rate: float, count: int, width: float) -> None:
    """A width of 0.5 leaves few points, for which dp-accounting has another way."""
    one = discretize_gaussian(sigma, rate, width)
    own = self_compose(one, count)
    theirs = one.self_compose(count)
    for mine, other in ((own._pmf_remove, theirs._pmf_remove), (own._pmf_add, theirs._pmf_add)):
        dense = mine.to_dense_pmf()
        expected = other.to_dense_pmf()
        assert dense._lower_loss == expected._lower_loss
        assert dense._infinity_mass == expected._infinity_mass
        np.testing.assert_array_equal(dense._probs, expected._probs)


@settings(max_examples=12, deadline=None)
@given(
    sigma=st.floats(0.5, 100.0),
    rate=st.one_of(st.just(1.0), st.floats(1e-3, 1.0)),
    count=st.integers(1, 100),
    epsilons=st.lists(st.floats(0.0, 60.0), max_size=20),
)
def test_a_curve_is_that_of_dp_accounting(sigma: float, rate: float, count: int, epsilons: list[float]) -> None:
    composed = discretize_gaussian(sigma, rate, 2e-3).self_compose(count)
    ascending = sorted([*epsilons, -1.0, 0.0, 2e-3, 500.0])
    expected = composed.get_delta_for_epsilon(ascending)
    np.testing.assert_array_equal(find_deltas(composed, np.asarray(ascending)), expected)


@settings(max_examples=12, deadline=None)
@given(
    sigma=st.floats(0.3, 100.0),
    rate=st.one_of(st.just(1.0), st.floats(1e-3, 1.0)),
    count=st.integers(1, 100),
    delta=st.one_of(st.floats(0.0, 1.0), st.floats(1e-12, 1e-3)),
)
def test_epsilon_is_that_of_dp_accounting(sigma: float, rate: float, count: int, delta: float) -> None:
    """To the last digit; also 0, where hardly anything is spent, and infinity, where δ is less than the tails."""
    composed = discretize_gaussian(sigma, rate, 2e-3).self_compose(count)
    for at in (delta, composed._pmf_remove._infinity_mass, 0.0):
        with np.errstate(over="ignore"):
            assert find_epsilon(composed, at) == composed.get_epsilon_for_delta(at)


@pytest.mark.parametrize("rate", [0.001, 0.3, 1.0])
def test_composed_steps_have_the_same_epsilon(rate: float) -> None:
    own = self_compose(discretize_gaussian(1.1, rate, 5e-4), 30)
    theirs = from_gaussian_mechanism(1.1, value_discretization_interval=5e-4, sampling_prob=rate).self_compose(30)
    assert [find_epsilon(own, delta) for delta in DELTAS] == [theirs.get_epsilon_for_delta(delta) for delta in DELTAS]


def test_losses_beyond_every_exponential_overflow_nothing() -> None:
    """Full batches with little noise have privacy losses of more than 709, where exp has no number."""
    own = discretize_gaussian(0.02, 1.0, 0.5)
    theirs = from_gaussian_mechanism(0.02, value_discretization_interval=0.5)
    assert find_epsilon(own, 1e-5) == theirs.get_epsilon_for_delta(1e-5) > 1250


def test_a_grid_that_meets_the_bound_of_sampled_losses() -> None:
    """Adding a record changes the privacy loss by less than -log(1 - q), which may be a point of the grid."""
    width = 0.01
    rate = 1 - np.exp(-20 * width)
    own = discretize_gaussian(1.0, rate, width)
    theirs = from_gaussian_mechanism(1.0, value_discretization_interval=width, sampling_prob=rate)
    np.testing.assert_array_equal(own.get_delta_for_epsilon(EPSILONS), theirs.get_delta_for_epsilon(EPSILONS))


@pytest.mark.parametrize(("sigma", "rate"), [(0.0, 0.5), (-1.0, 0.5), (1.0, 0.0), (1.0, 1.5)])
def test_impossible_parameters_are_refused(sigma: float, rate: float) -> None:
    with pytest.raises(ValueError, match=r"[Ss]tandard deviation|[Ss]ampling"):
        discretize_gaussian(sigma, rate, 1e-3)
