"""The Rényi filter across runs, against dp-accounting's own Rényi accountant and closed forms, and the check of the accountants."""

from __future__ import annotations

import math

import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cotune.privacy.accounting import filters
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.filters import (
    check_accountants,
    describe_composition,
    epsilon_filter,
    epsilon_over_runs,
    filter_order,
    renyi,
    renyi_epsilon,
)
from tests.support.failures import fails_with

few = settings(max_examples=15, deadline=None)
charges = st.lists(
    st.builds(Steps, st.floats(0.6, 50.0), st.one_of(st.floats(0.001, 0.5), st.just(1.0)), st.integers(1, 100)),
    min_size=1,
    max_size=3,
)


@few
@given(steps=charges, limit=st.floats(0.5, 20.0), delta=st.floats(1e-8, 1e-3))
def test_the_filter_counts_what_dp_accounting_says_at_its_order(steps: list[Steps], limit: float, delta: float) -> None:
    order = filter_order(limit, delta)
    accountant = RdpAccountant(orders=[order])
    for each in steps:
        accountant.compose(each.event())
    found, at = accountant.get_epsilon_and_optimal_order(delta)
    assert at == order
    assume(found > 0)  # it says 0 where δ alone bounds the distance, which the filter does not look for
    assert epsilon_filter(steps, limit, delta) == pytest.approx(found, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("sigma", "order"), [(0.5, 2.0), (1.0, 7.3), (20.0, 31.0)])
def test_the_divergence_of_gaussian_steps_is_the_closed_form(sigma: float, order: float) -> None:
    """Mironov 2017, proposition 7: α/(2σ²) a step."""
    assert renyi([Steps(sigma, 1.0, 3)], order) == pytest.approx(3 * order / (2 * sigma**2), rel=1e-12)


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.1), (2.0, 0.5)])
def test_the_divergence_at_order_two_is_the_closed_form(sigma: float, q: float) -> None:
    """Mironov, Talwar, Zhang 2019: at α = 2 it is log(1 + q²(exp(1/σ²) - 1))."""
    assert renyi([Steps(sigma, q, 1)], 2.0) == pytest.approx(math.log1p(q**2 * math.expm1(sigma**-2)), rel=1e-9)


@pytest.mark.parametrize("limit", [0.5, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("delta", [1e-4, 1e-6])
def test_the_order_is_the_best_for_a_gaussian_at_the_limit(limit: float, delta: float) -> None:
    order = filter_order(limit, delta)
    assert order == int(order) >= 2
    mu2 = 2 * (limit - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)) / order
    best = min(renyi_epsilon(a * mu2 / 2, a, delta) for a in range(2, 1000))
    assert renyi_epsilon(order * mu2 / 2, order, delta) == pytest.approx(limit, rel=1e-9)
    assert best == pytest.approx(limit, rel=2e-3)


def test_a_limit_that_is_none_has_the_order_of_a_usual_one() -> None:
    assert filter_order(1e6, 1e-5) == filter_order(8.0, 1e-5)


RUN = [Steps(1.0, 0.05, 20)]


def test_one_run_is_composed_by_pld_and_several_by_the_filter() -> None:
    one = {"a": RUN * 3, "b": [Steps(1.0, 0.05, 0)]}
    two = {"a": RUN, "b": RUN * 2}
    assert epsilon_over_runs({}, 8.0, 1e-5) == epsilon_over_runs({"a": []}, 8.0, 1e-5) == 0.0
    assert epsilon_over_runs(one, 8.0, 1e-5) == epsilon(RUN * 3, 5e-6)  # half of δ is for the worlds with a second run
    assert epsilon_over_runs(two, 8.0, 1e-5) == epsilon_filter(RUN * 3, 8.0, 5e-6)
    assert describe_composition(one, 8.0, 1e-5) == "pld"
    assert describe_composition(two, 8.0, 1e-5) == f"renyi filter, order {filter_order(8.0, 5e-6)}"


@few
@given(steps=charges, more=charges)
def test_filter_is_monotone_and_never_below_the_accountant(steps: list[Steps], more: list[Steps]) -> None:
    before = epsilon_over_runs({"a": steps, "b": steps}, 8.0, 1e-5)
    after = epsilon_over_runs({"a": steps, "b": steps, "c": more}, 8.0, 1e-5)
    assert after >= before >= epsilon([*steps, *steps], 5e-6) - 1e-6


@few
@given(steps=charges, delta=st.floats(1e-8, 1e-2))
def test_the_accountants_agree(steps: list[Steps], delta: float) -> None:
    check_accountants(steps, delta)


@pytest.mark.parametrize("factor", [0.9, 1.3])
def test_an_accountant_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    steps = [Steps(1.0, 0.05, 200)]
    monkeypatch.setattr(filters, "epsilon", lambda s, d: factor * epsilon(s, d))
    with fails_with("privacy.accountants_disagree"):
        check_accountants(steps, 1e-5)
