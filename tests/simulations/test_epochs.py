"""Runs of epochs: organizations of different sizes take different numbers of steps, and the server holds each to its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cotune.server.rounds.updates.update_validation import UpdateSpec
from cotune.simulations.forecast.forecast import forecast
from cotune.simulations.run import simulate
from cotune.strategies.types import Update
from tests.support.simulations import NewPlan


def test_steps_follow_from_the_records(toy_plan: NewPlan, tmp_path: Path) -> None:
    table = toy_plan(simulation={"clients": 3, "partition": "quantity:2.0", "baselines": []}).model_dump(mode="json")
    local = {"epochs": 2.0, "batch_size": 10, "learning_rate": 1.0}
    plan = type(toy_plan()).model_validate({**table, "local": local, "rounds": 2})
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    assert [entry["dropped"] for entry in summary["rounds"]] == [[], []]
    steps = {o["name"]: (o["steps"], 2 * max(1, round(2 * o["examples"] / 10))) for o in summary["organizations"]}
    assert all(taken == expected for taken, expected in steps.values())
    assert len({taken for taken, _ in steps.values()}) > 1
    seen = forecast(plan, "cpu")
    assert {o.name: o.steps for o in seen.organizations} == {name: taken for name, (taken, _) in steps.items()}
    assert seen.stages[0].steps == max(taken for taken, _ in steps.values()) // 2


@pytest.mark.parametrize(("steps", "reason"), [(7, None), (8, "it states 8 steps, expected 7 with 70 examples")])
def test_steps_that_do_not_follow_are_not_admitted(steps: int, reason: str | None) -> None:
    shapes = {"w": torch.zeros(2)}
    update = Update("org", 1, shapes, 70, steps)
    found = UpdateSpec(round=1, shapes=shapes, steps_for=lambda examples: examples // 10).validate(update, "org").reason
    assert found == (reason or "")
