from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.failures import fails_with


def test_by_hand(fuse: Any) -> None:
    """n = 5, f = 1, so two neighbors: 0 → 1 + 4, 1 → 1 + 1, 2 → 1 + 4, 10 → 36 + 64, 4 → 4 + 9: 1 has the least."""
    assert fuse("krum", [[0.0], [1.0], [2.0], [10.0], [4.0]], malicious=1).tolist() == [1.0]


def test_distances_are_over_the_whole_delta(fuse: Any) -> None:
    """Near in `a`, far in `b`: the last two are the ones that lie together in both."""
    deltas = [{"a": [0.0], "b": [k]} for k in (90.0, -90.0, 50.0)] + [{"a": [3.0], "b": [b]} for b in (0.0, 1.0)]
    found = fuse("krum", deltas, malicious=1)
    assert found["a"].tolist() == [3.0]


@pytest.mark.parametrize(("count", "malicious"), [(5, 1), (7, 2), (9, 3), (12, 2), (6, 0)])
def test_against_byzfl(fuse: Any, byzfl: Any, rng: np.random.Generator, count: int, malicious: int) -> None:
    """byzfl takes n − f − 1 neighbors, the paper n − f − 2: its f is one more."""
    for _ in range(20):
        deltas = rng.normal(size=(count, 8))
        assert np.array_equal(fuse("krum", list(deltas), malicious=malicious), byzfl.Krum(malicious + 1)(deltas))


def test_too_few_updates_are_refused(fuse: Any) -> None:
    with fails_with("run.too_few_updates", "7", "6"):
        fuse("krum", [[1.0]] * 6, malicious=2)


def test_nearly_equal_deltas_of_large_values_are_told_apart(fuse: Any) -> None:
    """‖x‖² + ‖y‖² − 2⟨x, y⟩ would lose the differences."""
    deltas = [[1e8 + k] for k in (0.0, 0.25, 0.5, 3.0, 7.0)]
    assert fuse("krum", deltas, malicious=1).tolist() == [1e8 + 0.25]
