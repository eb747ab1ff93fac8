from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cotune.strategies.aggregator import build_aggregator
from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.config import StrategyConfig
from cotune.strategies.types import Aggregate, RoundContext, Update


def update(delta: list[float], trust: list[float], examples: int = 1) -> Update:
    return Update("org", 1, {"w": torch.tensor(delta)}, examples, 1, statistics={"fisher/w": torch.tensor(trust)})


def fused(*updates: Update, **parameters: float) -> Tensor:
    strategy = StrategyConfig.model_validate({"fusion": {"name": "fisher", **parameters}})
    combination = build_aggregator(strategy, RoundContext())
    for one in updates:
        combination.add(one)
    found = combination.result()
    assert isinstance(found, Aggregate)
    return found.delta["w"]


def test_by_hand() -> None:
    """F = 1, 3 of Δ = 8, 4: 20/4. F = 0, 2: the second alone. Nobody's records say anything: the mean."""
    found = fused(update([8.0, 8.0, 8.0], [1.0, 0.0, 0.0]), update([4.0, 4.0, 4.0], [3.0, 2.0, 0.0]), floor=1e-12)
    assert found.tolist() == pytest.approx([5.0, 4.0, 6.0])


def test_weights_count_beside_the_trust() -> None:
    """w = 3, 1 and F = 1, 3: the same trust."""
    assert fused(update([8.0], [1.0], 3), update([4.0], [3.0], 1), floor=1e-12).tolist() == pytest.approx([6.0])


def test_the_default_floor_is_far_below_any_trust() -> None:
    """Records that say nothing do not pull: 8, where a floor of 1 would give 6.67."""
    assert fused(update([8.0], [1.0]), update([4.0], [0.0])).tolist() == pytest.approx([8.0], abs=1e-4)


@given(
    values=st.lists(st.tuples(st.floats(-10, 10, width=32), st.floats(0, 100, width=32)), min_size=1, max_size=5),
    floor=st.floats(1e-6, 1.0),
)
def test_the_result_is_between_the_deltas(values: list[tuple[float, float]], floor: float) -> None:
    found = float(fused(*(update([delta], [trust]) for delta, trust in values), floor=floor))
    deltas = [delta for delta, _ in values]
    assert min(deltas) - 1e-9 <= found <= max(deltas) + 1e-9


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_statistics_cannot_be_had_under_record_privacy(name: str) -> None:
    strategy: Any = StrategyConfig.model_validate({"fusion": name})
    assert "statistics of the records" in str(find_problem(strategy, PlanFacts(record_privacy=True)))
    assert find_problem(strategy, PlanFacts(sums_only=True)) is None
