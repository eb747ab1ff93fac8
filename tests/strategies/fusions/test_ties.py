from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from cotune.strategies.fusions.merging.trimming import trim_to_density


def test_by_hand(fuse: Any) -> None:
    """Half of each: (5, 0, -4, 0), (-2, 3, 0, 0), (6, 0, 2, 0). Signs of the sums 9, 3, -2, 0; means of those that agree."""
    deltas = [[5.0, 1.0, -4.0, 0.5], [-2.0, 3.0, 1.0, 0.5], [6.0, -1.0, 2.0, -0.5]]
    assert fuse("ties", deltas, density=0.5).tolist() == [5.5, 3.0, -4.0, 0.0]
    assert fuse("ties", deltas, density=0.5, scale=2.0).tolist() == [11.0, 6.0, -8.0, 0.0]


def test_weights_vote_and_count_in_the_mean(fuse: Any) -> None:
    """One of weight 3 against two of weight 1: 3·2 > 2 + 3. Among agreeing ones it is their weighted mean."""
    assert fuse("ties", [[2.0], [-2.0], [-3.0]], [3.0, 1.0, 1.0], density=1.0).tolist() == [2.0]
    assert fuse("ties", [[2.0], [6.0], [-3.0]], [3.0, 1.0, 1.0], density=1.0).tolist() == [3.0]


def test_where_the_sum_is_nought_nothing_is_merged(fuse: Any) -> None:
    assert fuse("ties", [[2.0], [-2.0]], density=1.0).tolist() == [0.0]


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_against_peft(fuse: Any, rng: np.random.Generator, density: float, count: int) -> None:
    deltas = rng.normal(size=(count, 40))
    expected = merge_utils.ties(list(torch.from_numpy(deltas)), torch.ones(count, dtype=torch.float64), density)
    assert fuse("ties", list(deltas), density=density) == pytest.approx(expected.numpy(), rel=1e-12)


def test_the_largest_are_taken_of_the_whole_delta(fuse: Any) -> None:
    """Not a half of each parameter: both of the largest are in `a`."""
    found = fuse("ties", [{"a": [[9.0, 8.0]], "b": [2.0, 1.0]}], density=0.5)
    assert (found["a"].tolist(), found["b"].tolist()) == ([[9.0, 8.0]], [0.0, 0.0])


def test_trimming_keeps_one_entry_and_all_ties() -> None:
    delta = {"x": torch.tensor([1.0, -3.0, 3.0, 2.0])}
    assert trim_to_density(delta, 0.01)["x"].tolist() == [0.0, -3.0, 3.0, 0.0]
    assert trim_to_density(delta, 0.75)["x"].tolist() == [0.0, -3.0, 3.0, 2.0]
    assert trim_to_density(delta, 1.0)["x"].tolist() == delta["x"].tolist()


def test_a_parameter_that_one_alone_trains_is_merged_by_itself(fuse: Any) -> None:
    found = fuse("ties", [{"a": [1.0], "b": [5.0]}, {"a": [3.0]}], density=1.0)
    assert {name: values.tolist() for name, values in found.items()} == {"a": [2.0], "b": [5.0]}
