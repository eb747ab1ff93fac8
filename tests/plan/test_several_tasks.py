"""How much the loss of each of several tasks counts."""

from __future__ import annotations

from typing import Any

import pytest

from cotune.errors import PlanError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan

TASKS = [{"name": "mood", "labels": ["bad", "good"], "weight": 0.5}, {"name": "topic", "labels": [str(i) for i in range(8)]}]


def plan_of(**changes: Any) -> Plan:
    return parse_plan({"model": {"base": "b"}, "data": {"source": "r.csv"}, "train": "lora", "tasks": TASKS, **changes})


def test_weights_are_those_of_the_plan() -> None:
    assert plan_of().weights_of_classes() == (0.5, 0.5, *[1.0] * 8)


def test_weight_grows_with_the_norm_of_the_noise_in_a_head() -> None:
    """√2 and √8 are 2/3 and 4/3 of their mean."""
    found = plan_of(balance="noise_to_signal").weights_of_classes()
    assert found == pytest.approx((0.5 * 2 / 3,) * 2 + (4 / 3,) * 8)


def test_balance_is_for_several_tasks() -> None:
    with pytest.raises(PlanError, match="balance") as refused:
        parse_plan({"model": {"base": "b"}, "data": {"source": "r.csv"}, "balance": "noise_to_signal"})
    assert refused.value.code == "plan.invalid"
