from __future__ import annotations

import weakref

import pytest
import torch

from cotune.strategies import StrategyConfig, Update
from cotune.strategies.combination import Held, Streamed
from cotune.strategies.fusion import WeightedMean
from cotune.strategies.weighting import examples


def update(values: dict[str, float], examples: int = 10, noise: dict[str, float] | None = None) -> Update:
    return Update("a", 1, {n: torch.tensor([v]) for n, v in values.items()}, examples, 1, 1.0, noise_variance=noise)


def test_streamed_is_the_weighted_mean_and_lets_go_of_each_delta() -> None:
    combination = Streamed(examples, WeightedMean())
    seen = []
    for value, n in ((1.0, 10), (-3.0, 30)):
        one = update({"w": value}, n)
        seen.append(weakref.ref(one.delta["w"]))
        combination.add(one)
        del one
        assert seen[-1]() is None
    assert combination.result()["w"].item() == -2.0


def test_held_fuses_every_group_of_parameters_by_its_own_weights() -> None:
    combination = Held(lambda updates: [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}], WeightedMean())
    combination.add(update({"a": 0.0, "b": 0.0}))
    combination.add(update({"a": 4.0, "b": 4.0}))
    fused = combination.result()
    assert (fused["a"].item(), fused["b"].item()) == (2.0, 3.0)


def test_held_lets_go_of_the_deltas_at_the_end() -> None:
    combination = Held(lambda updates: [{"a": 1.0}], WeightedMean())
    one = update({"a": 1.0})
    seen = weakref.ref(one.delta["a"])
    combination.add(one)
    del one
    assert seen() is not None
    combination.result()
    assert seen() is None


def test_a_plan_chooses() -> None:
    assert isinstance(StrategyConfig().new_combination(), Streamed)
    aware = StrategyConfig.model_validate({"weighting": "noise_aware"}).new_combination()
    assert isinstance(aware, Held)
    aware.add(update({"w": 2.0}, 1, {"w": 1.0}))
    aware.add(update({"w": 2.0}, 1000, {"w": 9.0}))
    assert aware.result()["w"].item() == pytest.approx(2.0)
