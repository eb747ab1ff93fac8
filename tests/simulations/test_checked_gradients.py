"""A simulation checks how gradients are taken once for each stage and for what is trained in it, whatever its learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cotune.client.training.checks import gradient_checks
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.privacy.config import RecordPrivacy
from cotune.server.runs.events import observe_run
from cotune.simulations.run import simulate
from tests.support.simulations import NewPlan

LOCAL = {"learning_rate": 0.5, "momentum": 0.0, "steps": 1, "batch_size": 0.2}
ADAPTERS = {"mode": "lora", "rounds": 2}


@pytest.mark.parametrize(
    ("changes", "checked_in"),
    [
        ({"train": "head", "rounds": 3, "local": {**LOCAL, "schedule": "linear"}}, [1]),
        ({"train": [{"mode": "head", "rounds": 2}, ADAPTERS], "local": LOCAL}, [1, 3]),
        pytest.param(
            {"train": [{**ADAPTERS, "rounds": 3}], "local": LOCAL, "lora": {"factors": "alternate"}},
            [1, 2, 3],
            marks=pytest.mark.long,
        ),
    ],
    ids=["schedule", "stages", "alternate"],
)
def test_gradients_are_checked_once_for_what_is_trained(
    toy_plan: NewPlan, tmp_path: Path, changes: dict[str, Any], checked_in: list[int]
) -> None:
    plan = toy_plan(privacy={"epsilon": 8.0}, **changes)
    check = gradient_checks.check_gradients
    rounds: list[int] = []
    checked: list[int] = []

    def note(event: str, fields: dict[str, Any]) -> None:
        if event == "round_started":
            rounds.append(fields["round"])

    def noted(setup: TrainingSetup, privacy: RecordPrivacy, mode: str) -> float:
        if rounds:
            checked.append(rounds[-1])
        return check(setup, privacy, mode)

    with observe_run(note), patch.object(gradient_checks, "check_gradients", noted):
        simulate(plan, tmp_path / "run", device="cpu")
    assert checked == checked_in
