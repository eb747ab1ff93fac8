"""Weightings that need more than the deltas, through whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.server.rounds.updates.update_validation import UpdateSpec
from cotune.simulations.run import simulate
from cotune.strategies.types import Update
from tests.support.matrix import crossed
from tests.support.simulations import NewPlan, final_model, same


@pytest.mark.parametrize(("weighting", "privacy"), crossed(["q_fair", "tilted", "inverse_loss"], ["none", {"epsilon": 8.0}]))
def test_losses_are_told_in_every_round(toy_plan: NewPlan, tmp_path: Path, weighting: str, privacy: Any) -> None:
    plan = toy_plan(strategy={"weighting": weighting}, privacy=privacy, rounds=2, simulation={"baselines": []})
    run = simulate(plan, tmp_path / "run", device="cpu")
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    told = [entry["disclosures"] for entry in summary["rounds"]]
    assert [sorted(entry) for entry in told] == [["org-1", "org-2"]] * 2
    assert all(set(said) == {"loss"} and 0 <= said["loss"] <= 4 for entry in told for said in entry.values())
    if privacy == "none":
        assert told[1]["org-1"]["loss"] < told[0]["org-1"]["loss"]
    else:
        assert all(o["epsilon_spent"] <= 8.0 for o in summary["organizations"])


def test_the_server_judges_each_update(toy_plan: NewPlan, tmp_path: Path) -> None:
    """To the power of 1e-9 every score above 0 is 1: that is the uniform weighting."""
    about: dict[str, Any] = {"validation_fraction": 0.2, "rounds": 2, "simulation": {"baselines": []}}
    weightings = {
        "judged": {"name": "validation", "power": 20.0},
        "alike": {"name": "validation", "power": 1e-9},
        "uniform": "uniform",
    }
    judged, alike, uniform = (
        final_model(simulate(toy_plan(strategy={"weighting": weighting}, **about), tmp_path / name, device="cpu").folder)
        for name, weighting in weightings.items()
    )
    for name, tensor in uniform.items():
        torch.testing.assert_close(alike[name], tensor, rtol=1e-5, atol=1e-6)
    assert not same(judged, uniform)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({}, "it does not disclose the loss that the strategy of the plan needs"),
        ({"loss": -0.5}, "it discloses a loss of -0.5, expected 0 to 1e+06"),
        ({"loss": float("inf")}, "it discloses a loss of inf, expected 0 to 1e+06"),
        ({"loss": 0.0}, None),
    ],
)
def test_an_update_without_its_loss_is_not_admitted(told: dict[str, float], reason: str | None) -> None:
    shapes = {"w": torch.zeros(2)}
    update = Update("org", 1, shapes, 1, 1, disclosures=told)
    assert UpdateSpec(round=1, shapes=shapes, needs_loss=True).validate(update, "org").reason == (reason or "")
    silent = Update("org", 1, shapes, 1, 1)
    assert UpdateSpec(round=1, shapes=shapes).validate(silent, "org").is_valid
