"""Passes over the own records instead of steps."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from pydantic import ValidationError

from cotune.errors import PlanError
from cotune.plan.load import dump_plan, parse_plan
from cotune.plan.local_training import LocalTraining

TABLE: dict[str, Any] = {"model": {"base": "x"}, "data": {"source": "y.csv"}}


@pytest.mark.parametrize(
    ("local", "examples", "steps"),
    [
        ({}, 1000, 20),
        ({"steps": 3}, 1000, 3),
        ({"epochs": 1, "batch_size": 100}, 1000, 10),
        ({"epochs": 1, "batch_size": 100}, 1040, 10),
        ({"epochs": 2.5, "batch_size": 100}, 200, 5),
        ({"epochs": 2, "batch_size": 100}, 40, 2),
        ({"epochs": 0.1, "batch_size": 100}, 200, 1),
        ({"epochs": 1, "batch_size": 0.25}, 7, 4),
    ],
)
def test_how_many_steps_that_are(local: dict[str, Any], examples: int, steps: int) -> None:
    assert LocalTraining.model_validate(local).steps_per_round(examples) == steps


def test_not_both_and_not_neither() -> None:
    for wrong in ({"steps": 5, "epochs": 1}, {"steps": None}):
        with pytest.raises(ValidationError, match="expected either steps or epochs"):
            LocalTraining.model_validate(wrong)


def test_a_stage_may_say_it_the_other_way() -> None:
    stages = [{"mode": "head", "rounds": 1}, {"mode": "lora", "rounds": 1, "local": {"steps": 5, "batch_size": 10}}]
    plan = parse_plan({**TABLE, "local": {"epochs": 2, "learning_rate": 0.1}, "train": stages})
    assert [(s.local.steps, s.local.epochs, s.local.learning_rate) for s in plan.stages] == [(None, 2.0, 0.1), (5, None, 0.1)]
    assert parse_plan(tomllib.loads(dump_plan(plan))) == plan
    assert parse_plan(plan.model_dump(mode="json")).plan_id == plan.plan_id


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_state_at_the_organizations_wants_steps(strategy: str) -> None:
    with pytest.raises(PlanError, match=f'"{strategy}" assumes as many steps at every organization'):
        parse_plan({**TABLE, "local": {"epochs": 1}, "strategy": strategy})
    parse_plan({**TABLE, "local": {"epochs": 1}, "strategy": "fedprox"})
