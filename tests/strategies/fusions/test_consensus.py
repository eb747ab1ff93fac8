from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.failures import fails_with


def test_by_hand(fuse: Any) -> None:
    """λ = 1. First coordinate: 5 against |2 − 4|, 2 against |5 − 4|, −4 against 7: two matter, mean 1. Second: 1 against 0 twice
    over, and 0 against 1: one alone matters. Third: nobody, 1 against 2."""
    deltas = [[5.0, 1.0, 1.0], [2.0, 0.0, 1.0], [-4.0, 0.0, 1.0]]
    assert fuse("consensus", deltas, threshold=1.0).tolist() == [1.0, 0.0, 0.0]
    assert fuse("consensus", deltas, threshold=1.0, agreement=1).tolist() == pytest.approx([1.0, 1 / 3, 0.0])
    assert fuse("consensus", deltas, threshold=1.0, agreement=3).tolist() == [0.0, 0.0, 0.0]
    assert fuse("consensus", deltas, threshold=0.4).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("threshold", [0.2, 0.6, 1.5])
@pytest.mark.parametrize("agreement", [1, 2, 3])
def test_against_the_formula(fuse: Any, rng: np.random.Generator, threshold: float, agreement: int) -> None:
    deltas = rng.normal(size=(5, 60))
    weights = [1.0, 2.0, 3.0, 1.0, 1.0]
    masks = np.abs(deltas) > threshold * np.abs(deltas.sum(axis=0) - deltas)
    expected = np.average(deltas, axis=0, weights=weights) * (masks.sum(axis=0) >= agreement)
    found = fuse("consensus", list(deltas), weights, threshold=threshold, agreement=agreement)
    assert found == pytest.approx(expected, rel=1e-12)


def test_weights_do_not_decide_who_matters(fuse: Any) -> None:
    """Were −1 weighed by 9, nothing of 5 would matter."""
    assert fuse("consensus", [[5.0], [4.0], [-1.0]], [1.0, 1.0, 9.0], threshold=1.0).tolist() == [0.0]


def test_fewer_updates_than_must_agree_are_refused(fuse: Any) -> None:
    with fails_with("run.too_few_updates", "3"):
        fuse("consensus", [[1.0], [1.0]], agreement=3)
