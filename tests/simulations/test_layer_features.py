"""Runs whose head reads layers: the plan says what everybody reads, and the model that comes out is used like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.client.consent.plan_summary import summarize_plan
from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from cotune.errors import PlanError
from cotune.models.evaluation.predictor import evaluate_classifier, open_predictor
from cotune.plan.load import load_plan
from cotune.simulations.run import simulate
from tests.support.processes import Cotune, Moment, play_whole_and_killed
from tests.support.simulations import BY_PRIOR, COMPARED, NewPlan, tensors_of

FEATURE = {"layers": [0, 1, 2]}


def test_a_run_on_layers(toy_plan: NewPlan, toy_data: Path, tmp_path: Path) -> None:
    plan = toy_plan(
        model={"pooling": "auto", "feature": FEATURE},
        privacy={"epsilon": 8.0},
        local={"batch_size": "all", "steps": 1, "learning_rate": 4.0},
        simulation=COMPARED,
        personalize=BY_PRIOR,
    )
    run = simulate(plan, tmp_path / "run", device="cpu")
    summary = run.summary
    assert summary["model"]["shared_parameters"] == 3 * 4 * 16 + 3
    assert all(0 < o["epsilon_spent"] <= 8.0 for o in summary["organizations"])
    assert summary["test"]["pooled"]["accuracy"] > summary["test"]["majority"]["accuracy"]
    kept = load_plan(run.folder / "plan.toml")
    assert kept.model.feature is not None
    assert kept.model.feature.map_hash is not None
    predictor = open_predictor(str(run.folder), "cpu")
    found = evaluate_classifier(predictor, read_records(DataConfig(source=str(toy_data))))
    assert found["records"] == 240
    assert predictor.labels == kept.labels


def test_a_run_on_layers_is_the_same_again(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Without noise: the map that the second run finds on the disk is the one that the first one has made."""
    plan = toy_plan(model={"pooling": "auto", "feature": FEATURE}, simulation={"baselines": []})
    folders = [simulate(plan, tmp_path / name, device="cpu").folder for name in ("one", "two")]
    one, two = ((folder / "model" / "head.safetensors").read_bytes() for folder in folders)
    assert one == two


@pytest.mark.crash
def test_killed_run_on_layers_ends_as_if_it_had_not_been(toy_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = toy_plan(model={"pooling": "auto", "feature": FEATURE}, simulation={"baselines": []})
    moments = (
        Moment("step", {"round": 1, "organization": "org-2"}),
        Moment("update_received", {"round": 3, "organization": "org-1"}),
    )
    whole, run = play_whole_and_killed(cotune, plan, tmp_path, moments)
    assert tensors_of(run) == tensors_of(whole)


def test_organizations_are_told_what_is_read(toy_plan: NewPlan) -> None:
    plan = toy_plan(model={"pooling": "auto", "feature": FEATURE})
    assert any("means of layers 0, 1, 2 and the first token, whitened by random tokens" in line for line in summarize_plan(plan))


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "lora"},
        {"train": "full"},
        {"train": [{"mode": "head", "rounds": 1}, {"mode": "lora", "rounds": 1}]},
        {"task": "token-classification"},
        {"task": "image-classification"},
        {"model": {"pooling": "mean", "feature": FEATURE}},
        {"model": {"pooling": "auto", "feature": {"layers": []}}},
        {"model": {"pooling": "auto", "feature": {"layers": [2, 1]}}},
        {"model": {"pooling": "auto", "feature": {"layers": [1, 1]}}},
        {"model": {"pooling": "auto", "feature": {"layers": [-1]}}},
        {"model": {"pooling": "auto", "feature": {**FEATURE, "map_hash": "../x"}}},
        {"model": {"pooling": "auto", "feature": {**FEATURE, "whiten": "records"}}},
    ],
)
def test_plans_that_cannot_have_it_are_refused(toy_plan: NewPlan, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        toy_plan(**{"model": {"pooling": "auto", "feature": FEATURE}, **changes})
    assert caught.value.code == "plan.invalid"
