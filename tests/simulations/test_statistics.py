"""Fusions that want arrays beside the deltas, through whole runs, and what the server does not admit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cotune.errors import PlanError
from cotune.server.rounds.updates.update_validation import UpdateSpec
from cotune.simulations.forecast.forecast import forecast
from cotune.simulations.run import simulate
from cotune.strategies.types import Update
from tests.support.simulations import NewPlan


@pytest.mark.parametrize("fusion", ["fisher", "regmean"])
def test_a_run_learns_with_it(toy_plan: NewPlan, tmp_path: Path, fusion: str) -> None:
    plan = toy_plan(strategy={"fusion": fusion}, rounds=1, simulation={"baselines": []})
    entries = simulate(plan, tmp_path / "run", device="cpu").summary["rounds"]
    assert entries[0]["participants"] == ["org-1", "org-2"]
    assert entries[0]["metrics"]["accuracy"] > 0.5  # of three classes
    (stage,) = forecast(plan, device="cpu").stages
    assert stage.bytes_up == pytest.approx(entries[0]["bytes_up"], rel=0.01)


def test_under_privacy_there_is_none(toy_plan: NewPlan) -> None:
    with pytest.raises(PlanError, match=r"statistics of the records \(gram\) that no noise protects"):
        toy_plan(strategy={"fusion": "regmean"}, privacy={"epsilon": 8.0})


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "it has 0 arrays too many and lacks 2 (fisher/w, gram/w)"),
        ({"x": torch.zeros(1)}, "it has 1 arrays too many and lacks 0 (x)"),
        ({"gram/w": torch.zeros(3, 3)}, "gram/w has the shape (3, 3), expected (2, 2)"),
        ({"fisher/w": torch.tensor([1.0, torch.nan])}, "fisher/w has values that no sum of squares has"),
        ({"fisher/w": torch.tensor([1.0, -1e-6])}, "fisher/w has values that no sum of squares has"),
        ({"gram/w": torch.tensor([[1.0, 0.0], [0.0, -1.0]])}, "gram/w has values that no sum of squares has"),
        ({"gram/w": torch.tensor([[1.0, -1.0], [-1.0, 1.0]])}, None),
    ],
)
def test_wrong_arrays_are_not_admitted(arrays: dict[str, Tensor], reason: str | None) -> None:
    shapes = {"w": torch.zeros(2)}
    right = {"fisher/w": torch.ones(2), "gram/w": torch.eye(2)}
    update = Update("org", 1, shapes, 1, 1, statistics={**right, **arrays} if arrays else {})
    expected = {"fisher/w": (2,), "gram/w": (2, 2)}
    found = UpdateSpec(round=1, shapes=shapes, statistics=expected).validate(update, "org").reason
    assert found.startswith(reason) if reason else not found
