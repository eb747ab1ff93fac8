from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize


def test_one_pass_by_hand(fuse: Any) -> None:
    """From the mean 4 of 0, 3, 9 the distances are 4, 1, 5: z = (3 + 9/5) / (1/4 + 1 + 1/5)."""
    assert fuse("geometric_median", [[0.0], [3.0], [9.0]], passes=1).tolist() == pytest.approx([4.8 / 1.45])


def test_one_pass_with_weights_by_hand(fuse: Any) -> None:
    """From the weighted mean (0 + 2·3) / 3 = 2: β = 1/2, 2/1, and z = 2·3 / 2.5."""
    assert fuse("geometric_median", [[0.0], [3.0]], [1.0, 2.0], passes=1).tolist() == pytest.approx([2.4])


def test_many_passes_find_the_minimum(fuse: Any, rng: np.random.Generator) -> None:
    deltas = rng.normal(size=(6, 4))
    weights = [1.0, 2.0, 3.0, 1.0, 0.5, 1.5]

    def cost(z: np.ndarray) -> float:
        return float(np.dot(weights, np.linalg.norm(deltas - z, axis=1)))

    found = fuse("geometric_median", list(deltas), weights, passes=500)
    best = minimize(cost, deltas.mean(axis=0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000})
    assert found == pytest.approx(best.x, abs=1e-5)


def test_against_byzfl(fuse: Any, byzfl: Any, rng: np.random.Generator) -> None:
    """It starts at 0: the fixed point is the same."""
    deltas = rng.normal(size=(9, 5))
    found = fuse("geometric_median", list(deltas), passes=300, smoothing=0.1)
    assert found == pytest.approx(byzfl.GeometricMedian(nu=0.1, T=300)(deltas), abs=1e-9)


def test_starting_at_the_mean_is_byzfl_on_deltas_around_it(fuse: Any, byzfl: Any, rng: np.random.Generator) -> None:
    """Moved so that the mean is 0, where byzfl starts, every pass is the same."""
    deltas = rng.normal(size=(9, 5))
    deltas -= deltas.mean(axis=0)
    for passes in (1, 2, 3):
        found = fuse("geometric_median", list(deltas), passes=passes, smoothing=0.1)
        assert found == pytest.approx(byzfl.GeometricMedian(nu=0.1, T=passes)(deltas), abs=1e-12)


def test_distances_are_over_the_whole_delta(fuse: Any) -> None:
    """Cut into two parameters it is the same."""
    deltas = np.array([[0.0, 1.0], [4.0, 2.0], [9.0, -7.0]])
    found = fuse("geometric_median", [{"a": d[:1], "b": d[1:]} for d in deltas])
    assert [found["a"][0], found["b"][0]] == pytest.approx(fuse("geometric_median", list(deltas)))


def test_a_hostile_update_hardly_moves_it(fuse: Any, rng: np.random.Generator) -> None:
    honest = rng.normal(size=(8, 20))
    found = fuse("geometric_median", [*honest, np.full(20, 1e6)], passes=50)
    assert np.linalg.norm(found - honest.mean(axis=0)) < 3


def independent(deltas: np.ndarray, weights: list[float]) -> np.ndarray:
    """Weiszfeld with a smoothing that is halved down to 1e-9, from the coordinate-wise median: not a line in common."""
    z = np.median(deltas, axis=0)
    smooth = 1.0
    while smooth > 1e-9:
        for _ in range(200):
            pull = np.asarray(weights) / np.sqrt(np.square(deltas - z).sum(axis=1) + smooth**2)
            z = pull @ deltas / pull.sum()
        smooth /= 2
    return z


@pytest.mark.parametrize("length", [1.0, 9_999.0, 1e8])
def test_default_is_the_minimum_whatever_one_norm_of_four(fuse: Any, length: float) -> None:
    """With 4 passes an update of norm 9,999 still held a share that destroyed the model (accuracy .495 in place of .736)."""
    rng = np.random.default_rng(3)
    direction = rng.normal(size=30)
    deltas = np.vstack([rng.normal(size=(3, 30)), length * direction / np.linalg.norm(direction)])
    weights = [3.0, 2.0, 2.5, 2.0]
    found = fuse("geometric_median", list(deltas), weights)
    assert np.linalg.norm(found - independent(deltas, weights)) < 1e-3
    assert np.linalg.norm(fuse("geometric_median", list(deltas), weights, passes=4) - found) > 1 or length < 1e4


def test_it_stops_where_nothing_moves_any_more(fuse: Any, rng: np.random.Generator) -> None:
    deltas = list(rng.normal(size=(5, 6)))
    assert fuse("geometric_median", deltas, passes=100) == pytest.approx(fuse("geometric_median", deltas, passes=1000), abs=1e-5)
