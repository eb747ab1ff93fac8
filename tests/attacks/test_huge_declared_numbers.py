"""A member that declares millions of records: the bound on its update takes the server no longer than that of any other.

The server computes the bound for the declared number. It followed as many steps one by one as epochs over that number have, which
could be 10¹³, and calibrated noise at vanishing sample rates: with the default plan that took a minute, and a gigabyte.
"""

from __future__ import annotations

from typing import Any

import pytest

from cotune.plan import update_norm
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.update_norm import bound_update_norm
from cotune.privacy.accounting.composition import calibrate

SGD = {"learning_rate": 0.5, "momentum": 0.9, "weight_decay": 0.01, "epochs": 2.0, "batch_size": 100}
OPTIMIZERS = [
    SGD,
    {**SGD, "momentum": 0.0, "weight_decay": 0.0},
    {**SGD, "momentum": 0.99, "weight_decay": 0.0},
    {**SGD, "learning_rate": 3.0, "weight_decay": 0.5, "momentum": 0.0},
    {**SGD, "optimizer": "adam", "momentum": 0.0, "weight_decay": 0.0},
    {**SGD, "optimizer": "adamw", "momentum": 0.0},
]


def plan_of(local: dict[str, Any], most: int = 10_000_000) -> Plan:
    table = {"model": {"base": "x"}, "data": {"source": "y.csv"}, "rounds": 2, "privacy": {"epsilon": 3.0}, "local": local}
    return parse_plan({**table, "server": {"max_examples": most}})


def bound(plan: Plan, examples: int) -> float:
    found = bound_update_norm(plan, plan.stages[0], examples=examples, entries=100, start=2.0)
    assert found is not None
    return found


@pytest.mark.parametrize("local", OPTIMIZERS)
def test_steps_that_are_not_followed_only_loosen_the_bound(local: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(local)
    exact = bound(plan, 5_000)  # 100 steps
    monkeypatch.setattr(update_norm, "_FOLLOWED", 30)
    assert exact * (1 - 1e-9) <= bound(plan, 5_000) < 30 * exact


@pytest.mark.parametrize("examples", [200_000, 1_000_000])
def test_the_noise_of_more_records_is_no_larger(examples: int) -> None:
    plan = plan_of({"batch_size": 100, "steps": 20})
    assert plan.privacy != "none"
    sigma = calibrate([(100 / examples, 40)], epsilon=3.0, delta=examples**-1.5)
    found = update_norm._noise(plan, plan.privacy, examples)
    assert found is not None
    assert sigma <= found < 2 * sigma


def test_a_bound_for_as_many_as_may_be_declared_is_found() -> None:
    """10¹³ steps of one record each."""
    plan = plan_of({"epochs": 10.0, "batch_size": 1, "learning_rate": 1e-9}, most=10**12)
    assert bound(plan, 10**12) > 0
