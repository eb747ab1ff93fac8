from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from pydantic import ValidationError
from scipy.optimize import brentq
from scipy.stats import norm

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps, calibrate, epsilon, epsilon_lower_bound, epsilon_rdp
from cotune.privacy.accounting.tradeoff import gaussian_mu, trade_off, true_positive_rate
from cotune.privacy.config import RecordPrivacy
from tests.support.failures import fails_with

DELTA = 1e-5
few = settings(max_examples=4, deadline=None)  # each composes distributions; `make test-faults` plays a hundred
sigmas = st.floats(0.7, 4.0)
rates = st.floats(0.01, 0.2)
counts = st.integers(1, 100)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """dp-accounting logs the Rényi orders that it leaves out."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def solve(delta_at: Callable[[float], float], delta: float) -> float:
    """The ε at which a decreasing δ(ε) is `delta`."""
    return float(brentq(lambda e: delta_at(e) / delta - 1, 1e-9, 60.0, xtol=1e-12))


def gaussian_delta(eps: float, sigma: float) -> float:
    """Balle & Wang, ICML 2018, theorem 8: the exact δ(ε) of the Gaussian mechanism with sensitivity 1."""
    half = 1 / (2 * sigma)
    scaled = eps * sigma
    return float(norm.cdf(half - scaled) - math.exp(eps) * norm.cdf(-half - scaled))


def sampled_gaussian_delta(eps: float, sigma: float, q: float) -> float:
    """The exact δ(ε) of one Poisson-sampled Gaussian step: (1-q)·N(0, σ²) + q·N(1, σ²) against N(0, σ²), the larger way round."""

    def threshold(ratio: float) -> float:
        return sigma**2 * math.log((ratio - 1 + q) / q) + 0.5

    up = threshold(math.exp(eps))
    with_record = (1 - q) * norm.sf(up / sigma) + q * norm.sf((up - 1) / sigma)
    removed = float(with_record - math.exp(eps) * norm.sf(up / sigma))
    if math.exp(-eps) <= 1 - q:
        return removed
    down = threshold(math.exp(-eps))
    with_record = (1 - q) * norm.cdf(down / sigma) + q * norm.cdf((down - 1) / sigma)
    return max(removed, float(norm.cdf(down / sigma) - math.exp(eps) * with_record))


def finely(steps: list[Steps], delta: float, interval: float = 1e-4) -> float:
    """dp-accounting by itself: every single event composed, on a grid five times finer than ours."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    for s in steps:
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(s.noise_multiplier)
        if s.sample_rate < 1:
            event = dp_event.PoissonSampledDpEvent(s.sample_rate, event)
        accountant.compose(event, s.count)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_one_full_batch_step_is_the_gaussian_mechanism(sigma: float, delta: float) -> None:
    exact = solve(lambda e: gaussian_delta(e, sigma), delta)
    assert exact - 1e-6 <= epsilon([Steps(sigma, 1.0, 1)], delta) <= exact * 1.002


@pytest.mark.parametrize(("sigma", "count"), [(4.0, 4), (10.0, 10), (10.0, 100), (25.0, 1000)])
def test_full_batch_steps_compose_like_one_with_less_noise(sigma: float, count: int) -> None:
    exact = solve(lambda e: gaussian_delta(e, sigma / math.sqrt(count)), DELTA)
    assert exact - 1e-6 <= epsilon([Steps(sigma, 1.0, count)], DELTA) <= exact * 1.005


@pytest.mark.parametrize(("sigma", "q"), [(0.6, 0.1), (0.8, 0.5), (1.0, 0.02), (1.5, 0.9)])
def test_one_sampled_step_is_the_exact_mixture(sigma: float, q: float) -> None:
    exact = solve(lambda e: sampled_gaussian_delta(e, sigma, q), DELTA)
    assert exact - 1e-6 <= epsilon([Steps(sigma, q, 1)], DELTA) <= exact * 1.005


@pytest.mark.parametrize(
    ("steps", "delta"),
    [
        ([Steps(1.0, 0.05, 200)], 1e-5),
        ([Steps(0.8, 0.0256, 390)], 1e-6),
        ([Steps(1.1, 256 / 60_000, 14_062)], 1e-5),
        ([Steps(4.0, 0.01, 10_000)], 1e-5),
        ([Steps(2.0, 0.1, 50), Steps(1.2, 0.02, 100), Steps(5.0, 1.0, 3)], 1e-5),
    ],
)
def test_epsilon_is_that_of_dp_accounting_on_a_finer_grid(steps: list[Steps], delta: float) -> None:
    assert epsilon(steps, delta) == pytest.approx(finely(steps, delta), rel=5e-3)


@pytest.mark.parametrize(("sigma", "q", "count"), [(10.0, 0.001, 1000), (30.0, 0.01, 1000), (100.0, 0.05, 2000)])
def test_a_small_epsilon_is_tight_too(sigma: float, q: float, count: int) -> None:
    """Privacy losses far below the width of the grid are still resolved."""
    steps = [Steps(sigma, q, count)]
    assert epsilon(steps, DELTA) == pytest.approx(finely(steps, DELTA, 4e-6), rel=1e-2)


@pytest.mark.parametrize(("sigma", "q", "count"), [(1.0, 0.05, 100), (0.8, 0.0256, 390), (1.0, 0.1, 200)])
def test_epsilon_agrees_with_the_prv_accountant(sigma: float, q: float, count: int) -> None:
    """Gopi et al., NeurIPS 2021, as in Opacus: another method and other code; its own error bound is 0.01."""
    other = PRVAccountant()
    other.history = [(sigma, q, count)]
    assert epsilon([Steps(sigma, q, count)], DELTA) == pytest.approx(float(other.get_epsilon(DELTA)), abs=0.02)


def test_published_values() -> None:
    """Abadi et al. 2016, section 5.1 (q = .01, σ = 4, T = 10,000): moments say 1.26, the truth is smaller; and z = 1, q = .1, T = 200."""
    assert 0.9 < epsilon([Steps(4.0, 0.01, 10_000)], DELTA) < 1.26
    assert epsilon([Steps(1.0, 0.1, 200)], DELTA) == pytest.approx(9.97, abs=0.01)


def test_ten_rounds_cost_more_than_one() -> None:
    """A fresh accountant per round says 1.98 in each of ten rounds (σ = 1, q = .05, 20 steps); the truth is 4.77, Rényi says 5.37."""
    one = [Steps(1.0, 0.05, 20)]
    ten = [Steps(1.0, 0.05, 20)] * 10
    assert epsilon(one, DELTA) == pytest.approx(1.98, abs=0.01)
    assert epsilon(ten, DELTA) == pytest.approx(4.77, abs=0.01)
    assert epsilon_rdp(ten, DELTA) == pytest.approx(5.37, abs=0.01)


@few
@given(sigma=sigmas, q=rates, rounds=st.lists(counts, min_size=2, max_size=5))
def test_rounds_compose_to_all_their_steps(sigma: float, q: float, rounds: list[int]) -> None:
    by_round = epsilon([Steps(sigma, q, count) for count in rounds], DELTA)
    assert by_round == epsilon([Steps(sigma, q, sum(rounds))], DELTA)
    assert by_round > max(epsilon([Steps(sigma, q, count)], DELTA) for count in rounds)


def test_stages_compose_in_any_order() -> None:
    stages = [Steps(2.0, 0.1, 30), Steps(1.2, 0.02, 50), Steps(2.0, 0.1, 7)]
    assert epsilon(stages, DELTA) == epsilon(stages[::-1], DELTA)
    assert epsilon(stages, DELTA) == pytest.approx(finely(stages, DELTA), rel=5e-3)


def test_no_steps_cost_nothing() -> None:
    assert epsilon([], DELTA) == 0.0
    assert epsilon([Steps(1.0, 0.1, 0)], DELTA) == 0.0


@few
@given(sigma=sigmas, q=rates, count=counts)
def test_renyi_accounting_is_never_below(sigma: float, q: float, count: int) -> None:
    steps = [Steps(sigma, q, count)]
    assert epsilon_rdp(steps, DELTA) >= epsilon(steps, DELTA)


@few
@given(sigma=sigmas, q=rates, count=counts, factor=st.floats(1.05, 2.0))
def test_epsilon_is_monotone_in_steps_rate_noise_and_delta(sigma: float, q: float, count: int, factor: float) -> None:
    base = epsilon([Steps(sigma, q, count)], DELTA)
    assert epsilon([Steps(sigma, q, math.ceil(count * factor))], DELTA) > base
    assert epsilon([Steps(sigma, q * factor, count)], DELTA) > base
    assert epsilon([Steps(sigma * factor, q, count)], DELTA) < base
    assert epsilon([Steps(sigma, q, count)], DELTA * factor) < base


@few
@given(sigma=st.floats(0.7, 50.0), q=st.one_of(rates, st.just(1.0)), count=counts)
def test_rounding_down_is_never_above(sigma: float, q: float, count: int) -> None:
    steps = [Steps(sigma, q, count)]
    assert 0 <= epsilon_lower_bound(steps, DELTA) <= epsilon(steps, DELTA)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 30.0])
def test_rounding_down_stays_below_the_exact_value_and_near_it(sigma: float) -> None:
    exact = solve(lambda e: gaussian_delta(e, sigma), DELTA)
    assert exact * 0.93 <= epsilon_lower_bound([Steps(sigma, 1.0, 1)], DELTA) <= exact + 1e-9


# --- the trade-off curve


@pytest.mark.parametrize(("sigma", "count"), [(0.5, 1), (2.0, 1), (4.0, 16), (50.0, 1)])
def test_the_mu_of_the_gaussian_mechanism_is_its_own(sigma: float, count: int) -> None:
    exact = math.sqrt(count) / sigma
    assert exact - 1e-9 <= gaussian_mu([Steps(sigma, 1.0, count)]) <= exact * 1.01


@few
@given(sigma=sigmas, q=rates, count=counts)
def test_gaussian_curve_lies_above_the_accountants(sigma: float, q: float, count: int) -> None:
    """Oracle: ε at several δ by the accountant is at most that of a Gaussian mechanism with σ = 1/μ."""
    steps = [Steps(sigma, q, count)]
    mu = gaussian_mu(steps)
    for delta in (1e-3, 1e-5, 1e-7):
        assert epsilon(steps, delta) <= solve(lambda e: gaussian_delta(e, 1 / mu), delta) * (1 + 1e-3) + 1e-6


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.2])
def test_gaussian_true_positive_rate_is_that_of_the_best_test(sigma: float, rate: float) -> None:
    """Neyman and Pearson: Φ(Φ⁻¹(rate) + 1/σ)."""
    exact = float(norm.cdf(norm.ppf(rate) + 1 / sigma))
    assert exact - 1e-6 <= true_positive_rate([Steps(sigma, 1.0, 1)], rate) <= exact * 1.05


@few
@given(sigma=sigmas, q=rates, count=counts, rate=st.floats(0.0, 1.0))
def test_attack_success_lies_between_chance_and_certainty(sigma: float, q: float, count: int, rate: float) -> None:
    steps = [Steps(sigma, q, count)]
    found = true_positive_rate(steps, rate)
    assert rate - 1e-9 <= found <= 1
    assert found == 1 - trade_off(steps)(rate)


@few
@given(sigma=sigmas, q=st.sampled_from([0.02, 0.1, 1.0]), rounds=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_steps_computed_once_compose_as_by_the_accountant(sigma: float, q: float, rounds: list[int]) -> None:
    """Round after round, with another mechanism beside: the same ε as a fresh `PLDAccountant` of dp-accounting, bit for bit."""
    for finished in range(1, len(rounds) + 1):
        steps = [Steps(sigma, q, sum(rounds[:finished])), Steps(8.0, 1.0, finished)]
        found = epsilon(steps, DELTA)
    assert found == finely(sorted(steps, key=lambda s: (s.noise_multiplier, s.sample_rate)), DELTA, 5e-4)


def test_nothing_spent_means_guessing() -> None:
    assert gaussian_mu([]) == gaussian_mu([Steps(1.0, 0.1, 0)]) == 0.0
    assert true_positive_rate([], 0.01) == 0.01
    with pytest.raises(ValueError, match="expected"):
        true_positive_rate([], 1.01)


def assert_smallest(
    sigma: float, planned: list[tuple[float, int]], target: float, delta: float, spent: list[Steps] | None = None
) -> None:
    def at(value: float) -> float:
        return epsilon([*(spent or []), *(Steps(value, q, count) for q, count in planned)], delta)

    assert at(sigma) <= target < at(sigma * (1 - 2e-3))


@settings(max_examples=4, deadline=None)
@given(target=st.floats(0.7, 8.0), q=rates, count=st.integers(10, 200))
def test_calibrate_finds_the_smallest_noise(target: float, q: float, count: int) -> None:
    planned = [(q, count)]
    assert_smallest(calibrate(planned, epsilon=target, delta=DELTA), planned, target, DELTA)


def test_calibrate_covers_several_stages() -> None:
    planned = [(0.1, 30), (0.02, 100), (0.1, 10)]
    assert_smallest(calibrate(planned, epsilon=3.0, delta=1e-6), planned, 3.0, 1e-6)


def test_calibrate_is_sharp_where_a_coarse_grid_is_not() -> None:
    planned = [(0.01, 1000)]
    assert_smallest(calibrate(planned, epsilon=0.2, delta=DELTA), planned, 0.2, DELTA)


def test_calibrate_counts_what_was_spent() -> None:
    planned = [(0.1, 20), (0.02, 200)]
    spent = [Steps(1.5, 0.1, 20)]
    with_past = calibrate(planned, epsilon=3.0, delta=DELTA, spent=spent)
    assert_smallest(with_past, planned, 3.0, DELTA, spent)
    assert with_past > calibrate(planned, epsilon=3.0, delta=DELTA) * 1.05


def test_ten_rounds_calibrated_as_one_would_break_the_promise() -> None:
    one = calibrate([(0.05, 20)], epsilon=8.0, delta=DELTA)
    all_of_them = calibrate([(0.05, 200)], epsilon=8.0, delta=DELTA)
    assert epsilon([Steps(one, 0.05, 200)], DELTA) > 12.0
    assert epsilon([Steps(all_of_them, 0.05, 20)] * 10, DELTA) <= 8.0


def test_a_very_large_budget_still_gets_noise() -> None:
    assert calibrate([(0.01, 5)], epsilon=50.0, delta=DELTA) == 0.3


@pytest.mark.parametrize("target", [3.0, 40.0])
def test_calibrate_finds_noise_for_many_full_batches(target: float) -> None:
    planned = [(1.0, 100)]
    assert_smallest(calibrate(planned, epsilon=target, delta=DELTA), planned, target, DELTA)


def test_an_unreachable_budget_is_refused() -> None:
    with fails_with("privacy.epsilon_unreachable", "0.1", "10000", "1000"):
        calibrate([(0.5, 10_000)], epsilon=0.1, delta=1e-6)


def test_a_spent_budget_is_refused() -> None:
    with fails_with("privacy.epsilon_unreachable", "4.77"):
        calibrate([(0.05, 20)], epsilon=4.0, delta=DELTA, spent=[Steps(1.0, 0.05, 200)])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("q", "count", "target"), [(0.01, 1000, 0.01), (0.001, 1000, 0.02)])
def test_a_small_budget_that_is_within_reach_is_found(q: float, count: int, target: float) -> None:
    assert epsilon([Steps(1000.0, q, count)], DELTA) < target
    sigma = calibrate([(q, count)], epsilon=target, delta=DELTA)
    assert epsilon([Steps(sigma, q, count)], DELTA) <= target


@pytest.mark.parametrize(
    ("rule", "examples", "delta"),
    [
        ("1/n^1.1", 10_000, 10_000**-1.1),
        ("1/n", 4_000, 1 / 4_000),
        ("1 / n ** 2", 100, 1e-4),
        (1e-5, 2_000, 1e-5),
        ("1e-5", 2_000, 1e-5),
    ],
)
def test_delta_follows_its_rule(rule: float | str, examples: int, delta: float) -> None:
    assert RecordPrivacy(delta=rule).delta_for(examples) == pytest.approx(delta, rel=1e-12)


@pytest.mark.parametrize(
    "rule", ["2/n", "1/n^0.9", "1/n^-1", "1/n^", "n", "", "small", "nan", "inf", "0", 0, 1, -1e-5, True, "1/n!"]
)
def test_a_bad_delta_is_refused(rule: float | str) -> None:
    with pytest.raises(ValidationError, match="expected"):
        RecordPrivacy(delta=rule)


def test_a_delta_above_one_over_the_records_is_refused() -> None:
    with fails_with("privacy.delta_too_large", "privacy.delta", "0.001", "0.001", "1001", "1/n", "1.5"):
        RecordPrivacy(delta=1e-3).delta_for(1001)


@given(n=st.integers(2, 10**7), rule=st.sampled_from(["1/n", "1/n^1.1", "1/n^2"]))
def test_every_rule_gives_a_delta_of_at_most_one_over_n(n: int, rule: str) -> None:
    assert RecordPrivacy(delta=rule).delta_for(n) <= (1 / n) * (1 + 1e-12)


@pytest.mark.parametrize("rule", ["1/n", "1/n^1.1"])
def test_a_single_record_cannot_be_promised_anything(rule: str) -> None:
    """δ would be 1: any mechanism at all satisfies that."""
    with pytest.raises(PrivacyError):
        RecordPrivacy(delta=rule).delta_for(1)


@pytest.mark.parametrize("key", ["epsilon", "clip_norm"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bounds_are_positive_and_finite(key: str, value: float) -> None:
    with pytest.raises(ValidationError):
        RecordPrivacy.model_validate({key: value})


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="epsilom"):
        RecordPrivacy.model_validate({"epsilom": 1.0})
