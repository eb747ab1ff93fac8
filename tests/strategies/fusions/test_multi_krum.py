from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.failures import fails_with


def test_by_hand(fuse: Any) -> None:
    """Scores of test_krum: 0 → 5, 1 → 2, 2 → 5, 10 → 100, 4 → 13. The best three are 0, 1, 2; four: and 4."""
    deltas = [[0.0], [1.0], [2.0], [10.0], [4.0]]
    assert fuse("multi_krum", deltas, malicious=1, keep=3).tolist() == [1.0]
    assert fuse("multi_krum", deltas, malicious=1).tolist() == [7 / 4]


@pytest.mark.parametrize(("count", "malicious"), [(5, 1), (7, 2), (9, 3), (12, 2), (6, 0)])
def test_against_byzfl(fuse: Any, byzfl: Any, rng: np.random.Generator, count: int, malicious: int) -> None:
    """byzfl takes n − f − 1 neighbors and keeps n − f: its f is one more."""
    for _ in range(20):
        deltas = rng.normal(size=(count, 8))
        found = fuse("multi_krum", list(deltas), malicious=malicious, keep=count - malicious - 1)
        assert found == pytest.approx(byzfl.MultiKrum(malicious + 1)(deltas), rel=1e-12)


def test_keeping_one_is_krum_and_keeping_all_the_mean(fuse: Any, rng: np.random.Generator) -> None:
    deltas = list(rng.normal(size=(7, 5)))
    assert np.array_equal(fuse("multi_krum", deltas, malicious=2, keep=1), fuse("krum", deltas, malicious=2))
    assert fuse("multi_krum", deltas, malicious=2, keep=7) == pytest.approx(np.mean(deltas, axis=0))


def test_more_to_keep_than_there_are_is_refused(fuse: Any) -> None:
    with fails_with("run.too_few_updates", "8"):
        fuse("multi_krum", [[1.0]] * 5, malicious=1, keep=8)
