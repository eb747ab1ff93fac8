"""Weightings by the losses that organizations tell, by hand and through a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotune.strategies.aggregator import build_aggregator
from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.config import StrategyConfig
from cotune.strategies.types import Aggregate, RoundContext, Update
from cotune.strategies.weightings.inverse_loss import inverse_loss
from cotune.strategies.weightings.q_fair import q_fair
from cotune.strategies.weightings.tilted import tilted


def told(loss: float, examples: int = 1, delta: float = 0.0) -> Update:
    return Update("org", 1, {"w": torch.tensor([delta])}, examples, 1, disclosures={"loss": loss})


def fused(weighting: Mapping[str, Any] | str, *updates: Update, context: RoundContext | None = None) -> float:
    combination = build_aggregator(StrategyConfig.model_validate({"weighting": weighting}), context or RoundContext())
    for update in updates:
        combination.add(update)
    found = combination.result()
    assert isinstance(found, Aggregate)
    return float(found.delta["w"])


def test_by_hand() -> None:
    assert [inverse_loss(told(loss), power=2.0) for loss in (0.5, 2.0)] == [4.0, 0.25]
    assert inverse_loss(told(0.0), power=1.0) == pytest.approx(1000.0)
    assert [q_fair(told(loss), q=2.0) for loss in (0.5, 2.0, 0.0)] == pytest.approx([0.25, 4.0, 0.0])
    assert tilted([told(1.0, 10), told(1.0 + math.log(2), 30)], t=1.0) == pytest.approx([5.0, 30.0])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("inverse_loss", (8 * 1 / 1 + 0 * 1 / 3) / (1 + 1 / 3)),
        ({"name": "q_fair", "q": 1.0}, 8 * 1 / 4),
        ({"name": "q_fair", "q": 0.0}, 4.0),
        ({"name": "tilted", "t": -1.0}, 8 * 30 / (30 + 10 * math.exp(-2))),
    ],
)
def test_in_a_round(weighting: Any, expected: float) -> None:
    """Δ = 8 with the loss 1 and 30 records, Δ = 0 with the loss 3 and 10 records."""
    assert fused(weighting, told(1.0, 30, 8.0), told(3.0, 10, 0.0)) == pytest.approx(expected)


def test_where_nobody_has_any_loss_left_everybody_counts_alike() -> None:
    """A loss that is told with noise is often cut off at 0."""
    for q in (1.0, 10.0):
        assert fused({"name": "q_fair", "q": q}, told(0.0, 30, 8.0), told(0.0, 10, 0.0)) == pytest.approx(4.0)


@given(
    losses=st.lists(st.floats(0, 1000), min_size=1, max_size=6),
    t=st.floats(-100, 100),
    shift=st.floats(0, 100),
)
def test_tilted_neither_overflows_nor_minds_a_shift(losses: list[float], t: float, shift: float) -> None:
    weights = tilted([told(loss) for loss in losses], t=t)
    assert max(weights) == 1.0
    shifted = tilted([told(loss + shift) for loss in losses], t=t)
    assert shifted == pytest.approx(weights, rel=1e-6, abs=1e-9)


@given(losses=st.lists(st.floats(1e-3, 100), min_size=2, max_size=6, unique=True), power=st.floats(0.1, 10))
def test_the_order_of_the_losses_is_that_of_the_weights(losses: list[float], power: float) -> None:
    ordered = [told(loss) for loss in sorted(losses)]
    assert [q_fair(u, q=power) for u in ordered] == sorted(q_fair(u, q=power) for u in ordered)
    down = [inverse_loss(u, power=power) for u in ordered]
    assert down == sorted(down, reverse=True)


def test_what_organizations_must_send_is_in_the_plan() -> None:
    assert StrategyConfig.model_validate({"weighting": "tilted"}).sends == ("loss",)
    assert StrategyConfig.model_validate({"weighting": "examples"}).sends == ()


def test_validation_weighs_by_the_score_of_each_update_alone() -> None:
    """Accuracies ½ and 1 at power 2: weights ¼ and 1."""
    context = RoundContext(score=lambda delta: 0.5 if float(delta["w"]) == 8.0 else 1.0)
    weighting = {"name": "validation", "power": 2.0}
    assert fused(weighting, told(0.0, 1, 8.0), told(0.0, 1, 3.0), context=context) == pytest.approx((8 / 4 + 3) / 1.25)


def test_validation_needs_records_of_the_server() -> None:
    strategy = StrategyConfig.model_validate({"weighting": "validation"})
    assert "judges updates by records of the server" in str(find_problem(strategy, PlanFacts()))
    assert find_problem(strategy, PlanFacts(server_data=True)) is None
    assert "must see each update" in str(find_problem(strategy, PlanFacts(server_data=True, sums_only=True)))
