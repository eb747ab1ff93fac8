from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.failures import fails_with


def literally(deltas: np.ndarray, f: int) -> np.ndarray:
    """The paper in loops."""
    n = len(deltas)
    left = list(range(len(deltas)))
    chosen = []
    while len(chosen) < n - 2 * f:
        scores = []
        for i in left:
            near = sorted(float(((deltas[i] - deltas[j]) ** 2).sum()) for j in left if j != i)
            scores.append((sum(near[: max(1, len(left) - f - 2)]), sum(near)))
        chosen.append(left.pop(scores.index(min(scores))))
    values = deltas[chosen]
    found = np.empty(deltas.shape[1])
    for j in range(deltas.shape[1]):
        middle = np.median(values[:, j])
        found[j] = np.mean(sorted(values[:, j], key=lambda v: abs(v - middle))[: n - 4 * f])
    return found


@pytest.mark.parametrize(("count", "malicious"), [(7, 1), (9, 1), (11, 2), (13, 2), (15, 3), (4, 0)])
def test_against_the_paper_in_loops(fuse: Any, rng: np.random.Generator, count: int, malicious: int) -> None:
    for _ in range(10):
        deltas = rng.normal(size=(count, 6))
        assert fuse("bulyan", list(deltas), malicious=malicious) == pytest.approx(literally(deltas, malicious), rel=1e-12)


def test_by_hand(fuse: Any) -> None:
    """n = 7, f = 1: Krum leaves out the two far ones; of 1, 2, 3, 4, 6 the three nearest to 3 are 2, 3, 4."""
    assert fuse("bulyan", [[1.0], [2.0], [3.0], [4.0], [6.0], [90.0], [-80.0]], malicious=1).tolist() == [3.0]


def test_the_second_half_is_byzfls_mean_around_the_median(fuse: Any, byzfl: Any, rng: np.random.Generator) -> None:
    """Two updates are so far away that Krum leaves them out, whatever the order; byzfl's f is what is left out of the mean."""
    near = rng.normal(size=(5, 9))
    found = fuse("bulyan", [*near, np.full(9, 1e6), np.full(9, -1e6)], malicious=1)
    assert found == pytest.approx(byzfl.Meamed(2)(near), rel=1e-12)


def test_one_who_hides_in_one_coordinate_moves_it_little(fuse: Any, rng: np.random.Generator) -> None:
    """Krum may choose it, as its other coordinates are the mean's."""
    honest = rng.normal(size=(6, 400))
    hidden = honest.mean(axis=0)
    hidden[0] += 15
    found = fuse("bulyan", [*honest, hidden], malicious=1)
    assert honest[:, 0].min() <= found[0] <= honest[:, 0].max()
    assert np.array_equal(fuse("krum", [*honest, hidden], malicious=1), hidden)


def test_too_few_updates_are_refused(fuse: Any) -> None:
    with fails_with("run.too_few_updates", "7", "6"):
        fuse("bulyan", [[1.0]] * 6, malicious=1)
