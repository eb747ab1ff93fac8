from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def test_by_hand(fuse: Any) -> None:
    assert fuse("median", [[1.0, 9.0], [5.0, 2.0], [3.0, 4.0]]).tolist() == [3.0, 4.0]
    assert fuse("median", [[1.0], [100.0], [3.0], [4.0]]).tolist() == [3.5]


def test_every_parameter_over_those_that_sent_it(fuse: Any) -> None:
    found = fuse("median", [{"a": [1.0], "b": [7.0]}, {"a": [5.0]}, {"a": [9.0]}])
    assert {name: values.tolist() for name, values in found.items()} == {"a": [5.0], "b": [7.0]}


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_against_numpy_and_byzfl(fuse: Any, byzfl: Any, rng: np.random.Generator, count: int) -> None:
    deltas = rng.normal(size=(count, 3, 4))
    found = fuse("median", list(deltas))
    assert np.array_equal(found, np.median(deltas, axis=0))
    assert np.array_equal(found.ravel(), byzfl.Median()(deltas.reshape(count, -1)))


def test_hostile_update_of_five_moves_nothing_beyond_others(fuse: Any, rng: np.random.Generator) -> None:
    honest = rng.normal(size=(4, 50))
    found = fuse("median", [*honest, np.full(50, 1e9)])
    assert (found <= honest.max(axis=0)).all()
    assert (found >= honest.min(axis=0)).all()
