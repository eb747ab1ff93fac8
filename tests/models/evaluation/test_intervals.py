"""Against scipy and statistics by hand, and against what is known of units that are alike."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from sklearn.metrics import f1_score

from cotune.models.evaluation.intervals import (
    Answers,
    accuracy_interval,
    build_answers,
    compare_paired,
    f1_interval,
    wilson_interval,
)


def of(right: list[int], units: list[int] | None = None) -> Answers:
    """Answers of two classes, of which those marked 1 are right."""
    return build_answers([0] * len(right), [1 - r for r in right], units or range(len(right)), 2)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_by_its_formula(drawn: tuple[int, int]) -> None:
    right, total = drawn
    z = float(norm.ppf(0.975))
    p = right / total
    middle = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    expected = [max(0.0, (middle - half) / (1 + z * z / total)), min(1.0, (middle + half) / (1 + z * z / total))]
    assert list(wilson_interval(right, total)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (6, 0), (12, 3), (3, 12), (30, 29)])
def test_mcnemar_is_the_binomial_test_on_those_that_differ(better: int, worse: int) -> None:
    ours = [1] * 40 + [1] * better + [0] * worse
    theirs = [1] * 40 + [0] * better + [1] * worse
    found = compare_paired(of(ours), of(theirs))
    decided = better + worse
    assert found.difference == pytest.approx((better - worse) / len(ours))
    p = min(1.0, 2 * sum(math.comb(decided, k) for k in range(max(better, worse), decided + 1)) / 2**decided)
    assert found.p == pytest.approx(p if decided else 1.0)
    assert found.low <= found.difference <= found.high
    assert (found.answer == "too close to tell") == (p >= 0.05 or not decided)
    assert (found.low > 0 or found.high < 0) == (found.answer != "too close to tell")  # interval and test say the same


def test_the_answer_turns_with_the_models() -> None:
    good = of([1] * 20)
    bad = of([1] * 10 + [0] * 10)
    assert (compare_paired(good, bad).answer, compare_paired(bad, good).answer) == ("yes", "no")
    assert compare_paired(good, good).answer == "too close to tell"


def test_copies_of_records_prove_nothing_more() -> None:
    """Eight units that differ in six: ten answers of each unit leave the test as uncertain as one."""
    ours = [1] * 7 + [0]
    theirs = [0, 0, 0, 0, 1, 1, 1, 1]
    units = [u for u in range(8) for _ in range(10)]
    many = compare_paired(of([r for r in ours for _ in range(10)], units), of([r for r in theirs for _ in range(10)], units))
    naive = compare_paired(of([r for r in ours for _ in range(10)]), of([r for r in theirs for _ in range(10)]))
    assert naive.p < 1e-3 < many.p
    assert many.high - many.low > 2 * (naive.high - naive.low)
    assert many.difference == pytest.approx(naive.difference)


@settings(max_examples=50, deadline=None)
@example([0, 1, 1], [1, 0, 0])
@given(st.lists(st.integers(0, 1), min_size=2, max_size=4), st.lists(st.integers(0, 1), min_size=2, max_size=4))
def test_the_paired_bootstrap_against_every_resample(ours: list[int], theirs: list[int]) -> None:
    """Few enough units to write all resamples down: so many of them lie beyond the ends as the percentiles say."""
    n = min(len(ours), len(theirs))
    units = [u for u in range(n) for _ in range(2)]
    found = compare_paired(
        of([r for r in ours[:n] for _ in range(2)], units), of([r for r in theirs[:n] for _ in range(2)], units)
    )
    apart = [o - t for o, t in zip(ours[:n], theirs[:n], strict=True)]
    every = [sum(apart[i] for i in chosen) / n for chosen in itertools.product(range(n), repeat=n)]
    for end, sign in ((found.low, 1), (found.high, -1)):
        beyond = np.mean([sign * (each - end) < -1e-9 for each in every])
        up_to = np.mean([sign * (each - end) < 1e-9 for each in every])
        assert beyond < 0.025 + 0.01  # six standard deviations of a percentile of so many draws
        assert up_to > 0.025 - 0.01


def test_f1_interval_contains_f1_and_shrinks_with_root_n() -> None:
    rng = np.random.default_rng(1)

    def drawn(count: int) -> Answers:
        truth = rng.integers(0, 3, count)
        predicted = np.where(rng.random(count) < 0.7, truth, rng.integers(0, 3, count))
        return build_answers(truth.tolist(), predicted.tolist(), range(count), 3)

    few = drawn(200)
    many = drawn(20_000)
    for answers in (few, many):
        low, high = f1_interval(answers)
        assert low < f1_score(answers.truth, answers.predicted, average="macro") < high
    widths = [high - low for low, high in (f1_interval(few), f1_interval(many))]
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.25)
    assert f1_interval(few) == f1_interval(few)  # nothing is left to chance


def test_accuracy_of_single_record_units_has_wilson_interval() -> None:
    assert accuracy_interval(of([1, 1, 0, 1])) == wilson_interval(3, 4)
    low, high = accuracy_interval(of([1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2]))
    assert 0 <= low < 0.5 < high <= 1


def test_the_size_of_the_test() -> None:
    """Two models that are equally good are told apart in one of twenty comparisons at most."""
    rng = np.random.default_rng(3)
    predicted = 0
    for _ in range(200):
        ours, theirs = (rng.random(150) < 0.7 for _ in range(2))
        predicted += compare_paired(of(ours.astype(int).tolist()), of(theirs.astype(int).tolist())).answer != "too close to tell"
    assert binomtest(predicted, 200, 0.05, alternative="greater").pvalue > 1e-3
