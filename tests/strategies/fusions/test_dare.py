from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from cotune.strategies.types import RoundContext


def test_every_entry_is_dropped_or_grows(fuse: Any) -> None:
    found = fuse("dare", [np.full(1000, 3.0)], drop=0.25)
    assert set(found.tolist()) == {0.0, 4.0}
    assert (found == 0).mean() == pytest.approx(0.25, abs=0.05)


def test_its_expectation_is_the_weighted_mean(fuse: Any) -> None:
    """Over 4,000 seeds: the error of an average of p/(1−p) variance is some 1.6 % of an entry."""
    deltas = [[1.0, -2.0], [5.0, 2.0]]
    weights = [3.0, 1.0]
    found = [fuse("dare", deltas, weights, drop=0.5, context=RoundContext(seed=seed)) for seed in range(4000)]
    assert np.mean(found, axis=0) == pytest.approx(fuse("mean", deltas, weights), abs=0.1)


def test_its_variance_is_that_of_peft(fuse: Any) -> None:
    """Both drop each entry by itself with p and rescale: Var = p/(1−p) x²."""
    many = np.full(20_000, 2.0)
    torch.manual_seed(0)
    peft = merge_utils.prune(torch.from_numpy(many), density=0.4, method="random", rescale=True).numpy()
    found = fuse("dare", [many], drop=0.6)
    assert set(found.round(9)) == set(peft.round(9))
    assert found.var() == pytest.approx(1.5 * 4, rel=0.05)
    assert peft.var() == pytest.approx(1.5 * 4, rel=0.05)


def test_masks_follow_from_seed_round_and_organization(fuse: Any) -> None:
    deltas = [np.ones(200)]
    first = fuse("dare", deltas, context=RoundContext(seed=1, round=2))
    assert np.array_equal(first, fuse("dare", deltas, context=RoundContext(seed=1, round=2)))
    others = [
        fuse("dare", deltas, context=RoundContext(seed=2, round=2)),
        fuse("dare", deltas, context=RoundContext(seed=1, round=3)),
        fuse("dare", deltas, context=RoundContext(seed=1, round=2), changes=[{"organization": "somebody else"}]),
    ]
    assert not any(np.array_equal(first, other) for other in others)


def test_masks_do_not_depend_on_the_order_of_parameters(fuse: Any) -> None:
    ones = np.ones(50)
    found = [fuse("dare", [delta]) for delta in ({"a": ones, "b": ones}, {"b": ones, "a": ones})]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in "ab")
    assert not np.array_equal(found[0]["a"], found[0]["b"])


def test_without_dropping_it_is_the_mean(fuse: Any) -> None:
    assert fuse("dare", [[1.0], [5.0]], [1.0, 3.0], drop=0.0).tolist() == [4.0]
