from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from cotune.strategies.fusions.robust.robust import bounded_shares, compute_max_norm

WEIGHTS = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=8)


@given(WEIGHTS, st.floats(0.01, 0.49))
@settings(max_examples=100, deadline=None)
def test_no_share_is_above_the_bound_and_the_order_stays(weights: list[float], share: float) -> None:
    most = max(share, 1.5 / len(weights))
    shares = bounded_shares(weights, most)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) <= most * (1 + 1e-9)
    assert all(
        a <= b * (1 + 1e-9)
        for (v, a) in zip(weights, shares, strict=True)
        for (w, b) in zip(weights, shares, strict=True)
        if v <= w
    )


@given(WEIGHTS)
@settings(max_examples=100, deadline=None)
def test_the_cut_is_the_largest_that_keeps_the_bound(weights: list[float]) -> None:
    """An oracle that searches for c: the largest share falls with c."""
    most = max(0.4, 1.5 / len(weights))
    low = 0.0
    high = max(weights)
    for _ in range(200):
        c = (low + high) / 2
        kept = np.minimum(weights, c)
        low, high = (c, high) if kept.max() <= most * kept.sum() else (low, c)
    kept = np.minimum(weights, high)
    assert bounded_shares(weights, most) == pytest.approx(list(kept / kept.sum()), rel=1e-6)


def test_a_huge_count_is_cut_to_its_share() -> None:
    assert bounded_shares([1e7, 300.0, 200.0, 100.0], 0.4) == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_an_update_of_weight_zero_counts_for_nothing(fuse: Any) -> None:
    deltas = [[1.0], [2.0], [4.0], [99.0]]
    weights = [1.0, 1.0, 1.0, 0.0]
    assert fuse("robust", deltas, weights).tolist() == fuse("robust", deltas[:3]).tolist()


def test_norm_bound_is_infinite_for_two_and_lower_median_of_four() -> None:
    assert compute_max_norm([1.0, 9.0], 3.0) == float("inf")
    assert compute_max_norm([1.0, 9.0, 2.0], 3.0) == 6.0
    assert compute_max_norm([1.0, 9.0, 2.0, 4.0], 3.0) == 6.0


def test_of_three_it_is_the_mean_of_bounded_updates(fuse: Any) -> None:
    """Weights 1, 1, 100 become 1/4, 1/4, 1/2; the norm 90 becomes 3 · 2."""
    assert fuse("robust", [[1.0], [2.0], [90.0]], [1.0, 1.0, 100.0]).tolist() == pytest.approx([0.25 + 0.5 + 0.5 * 6])


def test_of_three_with_equal_weights_it_is_no_median(fuse: Any) -> None:
    """The mean of 1, 2 and 3 · 2: one step toward the geometric median would be at 2.45."""
    assert fuse("robust", [[1.0], [2.0], [90.0]]).tolist() == pytest.approx([3.0])


def test_of_four_it_is_the_median_on_a_line(fuse: Any) -> None:
    """On a line the geometric median is the weighted median: 3 holds the middle of 0.2, 0.2, 0.2, 0.4."""
    found = fuse("robust", [[1.0], [2.0], [3.0], [4.0]], [1.0, 1.0, 1.0, 2.0])
    best = minimize_scalar(lambda z: abs(z - 1) + abs(z - 2) + abs(z - 3) + 2 * abs(z - 4), bounds=(0, 5), method="bounded")
    assert found[0] == pytest.approx(best.x, abs=1e-2)


@pytest.mark.parametrize("length", [1.0, 5.0, 1e4, 1e9])
@pytest.mark.parametrize("count", [1.0, 1e7])
def test_one_of_four_moves_it_within_the_honest_spread(fuse: Any, length: float, count: float) -> None:
    rng = np.random.default_rng(1)
    common = rng.normal(size=50)
    honest = [common + 0.3 * rng.normal(size=50) for _ in range(3)]
    hostile = -length * common
    found = fuse("robust", [*honest, hostile], [1.0, 1.0, 1.0, count])
    farthest = max(np.linalg.norm(h - np.mean(honest, axis=0)) for h in honest)
    assert np.linalg.norm(found - np.mean(honest, axis=0)) < 2 * farthest
