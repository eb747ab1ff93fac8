from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.config import StrategyConfig
from cotune.strategies.types import Delta, RoundContext


def judged(score: Callable[[float], float]) -> RoundContext:
    return RoundContext(score=lambda delta: score(float(delta["x"])))


def test_who_makes_it_worse_is_left_out(fuse: Any) -> None:
    """Good is near 1. The order is 2 (best), -1, 5, 9: the mean of 2 and -1 is as near as 2 was, 5 makes it 2, 9 makes it 3.3."""
    context = judged(lambda x: -abs(x - 1))
    assert fuse("greedy_soup", [[9.0], [-1.0], [2.0], [5.0]], context=context).item() == 0.5


def test_what_the_best_lacks_the_next_may_bring(fuse: Any) -> None:
    """2 alone is better than 0; their mean is best."""
    assert fuse("greedy_soup", [[0.0], [2.0]], context=judged(lambda x: -abs(x - 1.2))).item() == 1.0


def test_an_equal_score_is_good_enough(fuse: Any) -> None:
    assert fuse("greedy_soup", [[1.0], [2.0], [6.0]], context=judged(lambda x: 0.5)).item() == 3.0


def test_against_the_recipe_in_loops(fuse: Any, rng: np.random.Generator) -> None:
    target = rng.normal(size=7)
    for _ in range(20):
        deltas = rng.normal(size=(6, 7))
        soup: list[np.ndarray] = []
        reached = -np.inf
        for k in np.argsort([np.linalg.norm(d - target) for d in deltas]):
            now = -np.linalg.norm(np.mean([*soup, deltas[k]], axis=0) - target)
            if now >= reached:
                soup = [*soup, deltas[k]]
                reached = now
        context = RoundContext(score=lambda delta: -float(np.linalg.norm(delta["x"].numpy() - target)))
        assert fuse("greedy_soup", list(deltas), context=context) == pytest.approx(np.mean(soup, axis=0))


def test_it_never_scores_worse_than_the_best_update(play: Any, rng: np.random.Generator) -> None:
    weights = torch.from_numpy(rng.normal(size=5))

    def score(delta: Delta) -> float:
        return float(torch.tanh(delta["x"] @ weights) + torch.sin(7 * delta["x"]).sum())

    for _ in range(20):
        deltas = rng.normal(size=(5, 5))
        found = play("greedy_soup", list(deltas), context=RoundContext(score=score))
        assert score(found.delta) >= max(score({"x": torch.from_numpy(d)}) for d in deltas)


def test_without_records_of_the_server_it_is_refused() -> None:
    strategy = StrategyConfig.model_validate({"fusion": "greedy_soup"})
    assert "expected validation_fraction above 0" in str(find_problem(strategy, PlanFacts()))
    assert find_problem(strategy, PlanFacts(server_data=True)) is None
