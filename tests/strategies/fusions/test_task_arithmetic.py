from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils


def test_by_hand(fuse: Any) -> None:
    assert fuse("task_arithmetic", [[1.0, 2.0], [3.0, -6.0]], scale=0.5).tolist() == [2.0, -2.0]


def test_against_peft(fuse: Any, rng: np.random.Generator) -> None:
    deltas = rng.normal(size=(4, 9))
    expected = merge_utils.task_arithmetic(list(torch.from_numpy(deltas)), torch.full((4,), 0.4, dtype=torch.float64))
    assert fuse("task_arithmetic", list(deltas), scale=0.4) == pytest.approx(expected.numpy())


def test_with_the_scale_one_by_n_it_is_the_mean(fuse: Any, rng: np.random.Generator) -> None:
    deltas = list(rng.normal(size=(8, 5)))
    assert fuse("task_arithmetic", deltas, scale=1 / 8) == pytest.approx(fuse("mean", deltas))


def test_a_parameter_that_one_alone_trains_counts_in_full(fuse: Any) -> None:
    found = fuse("task_arithmetic", [{"a": [1.0], "b": [5.0]}, {"a": [2.0]}], scale=1.0)
    assert {name: values.tolist() for name, values in found.items()} == {"a": [3.0], "b": [5.0]}
