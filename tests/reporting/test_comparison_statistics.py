"""The numbers of a comparison, against sums done by hand and tables of the t distribution."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.reporting.comparison_report import answer, render_comparison
from cotune.reporting.comparison_statistics import (
    Comparison,
    Measured,
    Variation,
    combine,
    deciding_measure,
    difference,
    estimate,
    holm,
)
from cotune.reporting.measures import get_measures

# 97.5 % quantiles of Student's t with 4 and 2 degrees of freedom, from a table
ACCURACY = get_measures(None)[0]
T4 = 2.776445
T2 = 4.302653


def cell(strategy: str, seed: int, accuracy: float | None, facet: str = "iid", **more: Any) -> Measured:
    settings = (("strategy", strategy), ("partition", facet))
    status = "failed" if accuracy is None else "finished"
    return Measured(
        settings, seed, f"{strategy}-{facet}-{seed}", status, metrics={} if accuracy is None else {"accuracy": accuracy}, **more
    )


def test_a_mean_and_its_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])  # standard deviation √2.5, of the mean √0.5
    assert found is not None
    assert (found.mean, found.count) == (3.0, 5)
    assert found.half == pytest.approx(T4 * 0.5**0.5, rel=1e-6)


def test_one_seed_has_no_interval_and_none_has_nothing() -> None:
    found = estimate([0.7])
    assert found is not None
    assert (found.mean, found.half, found.count) == (0.7, None, 1)
    assert estimate([]) is None


def test_a_paired_difference_by_hand() -> None:
    """Student's own sleep data (1908): ten patients, two drugs; mean difference 1.58, p = 0.00283."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = difference(dict(enumerate(second)), dict(enumerate(first)))
    assert found is not None
    assert found.estimate.mean == pytest.approx(1.58)
    assert found.estimate.half == pytest.approx(2.46 - 1.58, abs=0.005)  # the interval in the textbooks: 0.70 to 2.46
    assert found.p == pytest.approx(0.002833, abs=5e-7)


def test_only_seeds_that_both_have_are_paired() -> None:
    found = difference({1: 0.5, 2: 0.7, 4: 0.9}, {4: 0.8, 1: 0.5, 3: 0.0})
    assert found is not None
    assert found.estimate.count == 2
    assert found.estimate.mean == pytest.approx(0.05)
    assert difference({1: 0.5}, {2: 0.5}) is None


def test_a_test_that_cannot_be_made() -> None:
    one = {1: 0.5}
    same = {1: 0.5, 2: 0.7, 3: 0.9}
    shifted = {1: 0.6, 2: 0.8, 3: 1.0}
    found = [difference(one, one), difference(same, same), difference(shifted, same)]
    assert [each and each.p for each in found] == [None, 1.0, None]


def test_holm_by_hand() -> None:
    """The example in Holm's correction: 0.01·4, then 0.013·3 = 0.039 raised to the one before, 0.04·2, and 0.05."""
    assert holm([0.04, 0.01, 0.05, 0.013]) == pytest.approx([0.08, 0.04, 0.08, 0.04])
    assert holm([0.6, None, 0.7]) == [1.0, None, 1.0]
    assert holm([None]) == [None]


@given(st.lists(st.none() | st.floats(0, 1), max_size=8), st.randoms())
def test_holm_keeps_the_order_and_never_lowers(values: list[float | None], shuffle: random.Random) -> None:
    corrected = holm(values)
    known = sorted((p, q) for p, q in zip(values, corrected, strict=True) if p is not None and q is not None)
    assert all(p <= q <= min(1.0, p * len(known) + 1e-12) for p, q in known)
    assert all(one[1] <= other[1] for one, other in pairwise(known))
    order = list(range(len(values)))
    shuffle.shuffle(order)
    assert holm([values[i] for i in order]) == [corrected[i] for i in order]


CELLS = [
    *(cell("avg", seed, 0.80 + 0.01 * seed, worst=0.5, spread=0.1, epsilon=7.5) for seed in (1, 2, 3)),
    *(cell("ties", seed, accuracy, bytes_up=10 * seed) for seed, accuracy in ((1, 0.83), (2, 0.85), (3, 0.84))),
    *(cell("prox", seed, 0.9 if seed < 3 else None, seconds=1.0) for seed in (1, 2, 3)),
    *(cell(strategy, seed, 0.5, "dirichlet:0.1") for strategy in ("avg", "ties", "prox") for seed in (1, 2, 3)),
]


def test_rows_by_hand() -> None:
    avg, ties, prox, *others = combine(CELLS, "avg")
    assert [(row.value, row.facet) for row in (avg, ties, prox)] == [
        (v, (("partition", "iid"),)) for v in ("avg", "ties", "prox")
    ]
    assert (avg.difference, avg.epsilon, avg.bytes_up) == (None, 7.5, None)
    assert ties.difference is not None
    apart = ties.difference.estimate  # +0.02, +0.03, +0.01
    assert apart.mean == pytest.approx(0.02)
    assert apart.half == pytest.approx(T2 * 0.01 / 3**0.5, rel=1e-6)
    assert ties.difference.p == pytest.approx(0.0742, abs=5e-5)  # t = 2√3 with two degrees of freedom
    assert (ties.bytes_up, ties.seconds) == (20.0, None)
    assert prox.difference is not None
    assert (prox.difference.estimate.count, len(prox.failed), prox.failed[0].seed) == (2, 1, 3)
    assert prox.score is not None
    assert prox.score.mean == pytest.approx(0.9)  # of the seeds that finished
    assert prox.difference.p is not None
    smaller = min(ties.difference.p, prox.difference.p)
    assert min(ties.difference.holm or 0, prox.difference.holm or 0) == pytest.approx(2 * smaller)  # two tests in this facet
    assert [row.difference.holm for row in others if row.difference] == [1.0, 1.0]


@given(st.permutations(range(len(CELLS))))
def test_the_order_of_cells_does_not_matter(order: list[int]) -> None:
    found = {(row.value, row.facet): row for row in combine([CELLS[i] for i in order], "avg")}
    assert found == {(row.value, row.facet): row for row in combine(CELLS, "avg")}


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6), st.randoms())
def test_pairing_is_by_seed(pairs: list[tuple[float, float]], shuffle: random.Random) -> None:
    """What a seed adds to both sides changes no difference, and renaming seeds on both sides changes nothing."""
    own, base = ({seed: pair[k] for seed, pair in enumerate(pairs)} for k in (0, 1))
    plain = difference(own, base)
    names = list(range(len(pairs)))
    shuffle.shuffle(names)
    renamed = difference({names[s]: v for s, v in own.items()}, {names[s]: v for s, v in base.items()})
    shifted = difference({s: v + 10 * s for s, v in own.items()}, {s: v + 10 * s for s, v in base.items()})
    assert plain is not None
    for other in (renamed, shifted):
        assert other is not None
        assert other.estimate.mean == pytest.approx(plain.estimate.mean, abs=1e-9)
        assert other.estimate.half == pytest.approx(plain.estimate.half, abs=1e-9)


def test_the_baseline_is_the_named_one() -> None:
    rows = {(row.value, row.facet[0][1]): row for row in combine(CELLS, "ties")}
    assert rows["ties", "iid"].difference is None
    against = rows["avg", "iid"].difference
    assert against is not None
    assert against.estimate.mean == pytest.approx(-0.02)
    assert combine([replace(c, metrics={}, status="failed") for c in CELLS], "avg")[1].difference is None


def test_gain_is_a_mean_over_seeds_and_answers_are_counted() -> None:
    found = combine(
        [
            cell("mean", 1, 0.7, gain=0.02, answers=(1, 0, 2)),
            cell("mean", 2, 0.7, gain=0.04, answers=(0, 1, 2)),
            cell("ties", 1, 0.7),
        ],
        "mean",
    )
    [mean, ties] = found
    assert mean.gain is not None
    assert mean.gain.mean == pytest.approx(0.03)
    assert mean.answers == (1, 1, 4)
    assert ties.gain is ties.answers is None


def test_the_answer_names_what_is_better_worse_and_too_close() -> None:
    """By the corrected p-value alone: of +0.1 in three seeds almost alike, −0.1, and ±0.1."""
    shifts = {"up": (0.100, 0.101, 0.099), "down": (-0.100, -0.101, -0.099), "close": (0.1, -0.1, 0.05), "equal": (0.0, 0.0, 0.0)}
    base = [cell("avg", seed, 0.5 + 0.01 * seed) for seed in (1, 2, 3)]
    moved = [cell(name, seed, 0.5 + 0.01 * seed + by) for name, shift in shifts.items() for seed, by in enumerate(shift, start=1)]
    said = answer(combine([*base, *moved], "avg"), "avg", ACCURACY)
    assert said == "better than avg: up; worse: down; too close to tell: close, equal"
    one = [each for each in (*base, *moved) if each.seed == 1]
    assert (
        answer(combine(one, "avg"), "avg", ACCURACY)
        == "better than avg: none; worse: none; too close to tell: up, down, close, equal"
    )
    assert answer(combine(base, "avg"), "avg", ACCURACY) is None


def text_cell(strategy: str, seed: int, loss: float, **more: Any) -> Measured:
    settings = (("strategy", strategy),)
    metrics = {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.9}
    return Measured(settings, seed, f"{strategy}-{seed}", "finished", metrics=metrics, **more)


def test_of_texts_a_smaller_loss_is_better() -> None:
    shifts = {"up": (0.100, 0.101, 0.099), "down": (-0.100, -0.101, -0.099), "equal": (0.0, 0.0, 0.0)}
    cells = [text_cell("avg", seed, 2 + 0.01 * seed) for seed in (1, 2, 3)]
    cells += [text_cell(name, seed, 2 + 0.01 * seed + by) for name, shift in shifts.items() for seed, by in enumerate(shift, 1)]
    measure = deciding_measure(cells)
    rows = combine(cells, "avg")
    assert measure.key == "loss"
    assert answer(rows, "avg", measure) == "better than avg: down; worse: up; too close to tell: equal"
    [avg, up, *_] = rows
    assert avg.score is not None
    assert avg.score.mean == pytest.approx(2.02)
    assert up.difference is not None
    assert up.difference.estimate.mean == pytest.approx(0.1)


def test_the_page_of_texts_shows_losses(tmp_path: Path) -> None:
    cells = [text_cell(name, 1, loss, worst=loss + 1, curve=((1, loss),)) for name, loss in (("avg", 2.0), ("ties", 2.5))]
    found = Comparison(
        folder=tmp_path,
        plan="texts",
        variations=(Variation("strategy", ("avg", "ties")),),
        baseline="avg",
        seeds=(1,),
        private=False,
        cells=tuple(cells),
        rows=combine(cells, "avg"),
        measure=deciding_measure(cells),
    )
    page = render_comparison(found)
    assert "Test loss (nats per token)" in page
    assert "+0.500" in page
    assert "3.500" in page
    assert "Perplexity" in page
    assert "Macro" not in page
