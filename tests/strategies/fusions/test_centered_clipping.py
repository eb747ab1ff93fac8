from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cotune.strategies.types import RoundContext


def test_by_hand(fuse: Any) -> None:
    """From 0 with τ = 2: (1 + 2) / 2 = 1.5; from 1.5: (−0.5 + 2) / 2 more."""
    assert fuse("centered_clipping", [[1.0], [10.0]], norm=2.0, passes=1).tolist() == [1.5]
    assert fuse("centered_clipping", [[1.0], [10.0]], norm=2.0, passes=2).tolist() == [2.25]


def test_it_starts_where_the_round_before_ended(play: Any) -> None:
    deltas = [[1.0], [10.0]]
    first = play("centered_clipping", deltas, norm=2.0)
    second = play("centered_clipping", deltas, norm=2.0, context=RoundContext(round=2, memory=first.memory))
    assert first.memory["x"].tolist() == [1.5]
    assert second.delta["x"].tolist() == [2.25]


def test_what_a_round_does_not_train_stays_remembered(play: Any) -> None:
    memory = {"other": torch.tensor([7.0], dtype=torch.float64)}
    found = play("centered_clipping", [[1.0]], context=RoundContext(round=2, memory=memory))
    assert set(found.delta) == {"x"}
    assert found.memory["other"].tolist() == [7.0]


@pytest.mark.parametrize("passes", [1, 3])
def test_against_byzfl_over_rounds(play: Any, byzfl: Any, rng: np.random.Generator, passes: int) -> None:
    oracle = byzfl.CenteredClipping(L=passes, tau=1.5)
    memory = dict[str, torch.Tensor]()
    for _ in range(4):
        deltas = rng.normal(size=(6, 5))
        found = play("centered_clipping", list(deltas), norm=1.5, passes=passes, context=RoundContext(memory=memory))
        memory = dict(found.memory)
        assert found.delta["x"].numpy() == pytest.approx(oracle(deltas), abs=1e-12)


def test_weights_count(fuse: Any) -> None:
    assert fuse("centered_clipping", [[1.0], [10.0]], [3.0, 1.0], norm=2.0).tolist() == [1.25]
