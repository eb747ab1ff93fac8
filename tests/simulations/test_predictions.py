"""Runs whose organizations have models of their own, and share predictions for public inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from cotune.client.site import Site
from cotune.client.training.personal.parameters import PERSONAL
from cotune.client.training.personal.prediction_model import load_trained_model
from cotune.ensembles.public_inputs import PublicPredictions, read_public_inputs, to_shared, to_taught
from cotune.errors import CotuneError
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import RunFolder
from cotune.server.runs.run_model import final_params
from cotune.simulations.run import Run, simulate
from tests.support.datasets import sentences, write_csv
from tests.support.processes import Cotune, Moment, play_killed
from tests.support.simulations import NewPlan, tensors_of

BaseModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("public") / "public.csv", sentences(60, seed=5))


def plan_of(toy_plan: NewPlan, source: Path, **changes: Any) -> Plan:
    given = {
        "collaboration": "predictions",
        "public": {"source": str(source), "learning_rate": 0.05, "epochs": 20, "batch_size": 20, **changes.pop("public", {})},
        "simulation": {"baselines": [], **changes.pop("simulation", {})},
        "personalize": {"methods": []},
    }
    return toy_plan(**{**given, **changes})


def own_scores(folder: RunFolder, name: str) -> torch.Tensor:
    """What an organization's newest model says of the public inputs, as it travels: the oracle, outside of any round."""
    plan = folder.plan
    site = Site(folder.path / "sites" / name)
    model = load_trained_model(plan, site)
    state = site.load_newest_state(plan.plan_id, PERSONAL)
    predictions = PublicPredictions(model, read_public_inputs(plan, Path()), plan.model.precision, plan.seed)
    return to_shared(predictions.predict(state, list(state)), plan.public)


def distance_left(run: Run) -> float:
    """How far the student is from what it was taught on the public inputs, as a share of how far the base model is."""
    folder = RunFolder(run.folder)
    plan = folder.plan
    progress = folder.load()
    predictions = PublicPredictions(get_plan_model(plan, "cpu"), read_public_inputs(plan, Path()), "float32", plan.seed)
    state = final_params(plan, progress)
    fused = progress.state[SCORES]
    answered = fused.abs().sum(dim=1) > 0  # of votes: those that enough teachers agreed on
    taught = to_taught(fused, plan.public)[answered]
    ours = predictions.predict(state, list(state)).softmax(dim=1)[answered]
    before = predictions.predict({}, list(state)).softmax(dim=1)[answered]
    return float((ours - taught).abs().mean() / (before - taught).abs().mean())


@pytest.fixture(scope="module")
def unlike(toy_plan: NewPlan, base_model: BaseModel, public: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two architectures, with ε."""
    bases = [str(base_model("bert")), str(base_model("distilbert"))]
    privacy = {"epsilon": 8.0, "delta": 1e-3}
    plan = plan_of(toy_plan, public, rounds=2, privacy=privacy, simulation={"bases": bases, "baselines": ["alone"]})
    return simulate(plan, tmp_path_factory.mktemp("unlike") / "run", device="cpu")


def test_models_of_unlike_architecture_teach_one(unlike: Run) -> None:
    folder = RunFolder(unlike.folder)
    kinds = {name: AutoConfig.from_pretrained(unlike.folder / "sites" / name / "model").model_type for name in ("org-1", "org-2")}
    assert kinds == {"org-1": "bert", "org-2": "distilbert"}
    assert AutoConfig.from_pretrained(unlike.folder / "model").model_type == "bert"
    state = final_params(folder.plan, folder.load())
    exported = load_file(unlike.folder / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in state.items())


def test_what_is_fused_is_the_mean_of_what_the_models_say(unlike: Run) -> None:
    folder = RunFolder(unlike.folder)
    progress = folder.load()
    shares = progress.history[-1].weights
    said = sum(share * own_scores(folder, name).double() for name, share in shares.items())
    assert progress.state.keys() == {SCORES}
    assert progress.state[SCORES] == pytest.approx(said, abs=1e-4)


def test_every_round_is_charged_and_only_predictions_travel(unlike: Run) -> None:
    folder = RunFolder(unlike.folder)
    for name in ("org-1", "org-2"):
        ledger = Site(unlike.folder / "sites" / name).ledger()
        assert ledger.rounds(folder.plan.plan_id) == [1, 2]
        assert unlike.summary["organizations"][0]["epsilon_spent"] <= 8.0
    answers, classes = folder.plan.public.answers, len(folder.plan.labels)
    sent = folder.load().history[-1].bytes_up
    assert sent < 2 * (4 * answers * classes + 1000)
    assert unlike.summary["test"]["alone"]["each"].keys() == {"org-1", "org-2"}


def test_student_learns_what_all_say_together(toy_plan: NewPlan, public: Path, tmp_path: Path) -> None:
    run = simulate(plan_of(toy_plan, public, rounds=1, public={"epochs": 60}), tmp_path / "run", device="cpu")
    assert distance_left(run) < 0.5
    assert run.summary["test"]["federated"]["accuracy"] > run.summary["test"]["majority"]["accuracy"]


@pytest.mark.parametrize("fusion", ["median", pytest.param({"name": "trimmed_mean", "fraction": 0.34}, marks=pytest.mark.long)])
def test_predictions_are_fused_by_robust_rules(toy_plan: NewPlan, public: Path, tmp_path: Path, fusion: Any) -> None:
    strategy = {"weighting": "uniform", "fusion": fusion}
    plan = plan_of(toy_plan, public, rounds=1, strategy=strategy, simulation={"clients": 3})
    simulate(plan, tmp_path / "run", device="cpu")
    folder = RunFolder(tmp_path / "run")
    said = torch.stack([own_scores(folder, f"org-{n}") for n in (1, 2, 3)])
    assert folder.load().state[SCORES] == pytest.approx(said.median(dim=0).values, abs=1e-5)


def test_votes_travel_instead_of_scores(toy_plan: NewPlan, public: Path, tmp_path: Path) -> None:
    plan = plan_of(toy_plan, public, rounds=2, public={"share": "votes"}, strategy={"weighting": "uniform"})
    simulate(plan, tmp_path / "run", device="cpu")
    fused = RunFolder(tmp_path / "run").load().state[SCORES]
    assert set(fused.flatten().tolist()) <= {0.0, 0.5, 1.0}
    assert fused.sum(dim=1) == pytest.approx(torch.ones(len(fused)))


def test_noisy_votes_of_teachers_teach_a_student(toy_plan: NewPlan, public: Path, tmp_path: Path) -> None:
    pate = {"teachers": 9, "answers": 60, "threshold": 0.3}
    changes = {
        "public": {"share": "votes", "epochs": 60},
        "strategy": {"weighting": "uniform"},
    }
    plan = plan_of(toy_plan, public, rounds=1, privacy={"epsilon": 100.0, "delta": 1e-3, "pate": pate}, **changes)
    run = simulate(plan, tmp_path / "run", device="cpu")
    assert distance_left(run) < 0.8
    assert all(each["epsilon_spent"] <= 100.0 for each in run.summary["organizations"])
    assert "PATE" in run.summary["privacy"]["claim"]["mechanism"]
    assert not list(run.folder.glob("sites/*/model"))


MOMENTS = (
    Moment("step", {"round": 1, "organization": "org-2"}, nth=2),
    Moment("renamed", {"path": "*/org-1/kept/*/personal/*"}),  # the own model is kept, and its update is not
    Moment("update_received", {"round": 2, "organization": "org-2"}),  # all is there, and nothing distilled yet
    Moment("round_finished", {"round": 2}),
    Moment("step", {"round": 3, "organization": "org-1"}),
)


@pytest.mark.crash
@pytest.mark.parametrize("train", ["head", pytest.param("lora", marks=pytest.mark.long)])
def test_killed_run_ends_as_if_it_had_not_been(
    toy_plan: NewPlan, base_model: BaseModel, cotune: Cotune, public: Path, tmp_path: Path, train: str
) -> None:
    bases = [str(base_model("bert")), str(base_model("distilbert"))]
    local = {"learning_rate": 1.0, "momentum": 0.0}
    changes = {"public": {"epochs": 4}, "simulation": {"bases": bases}}
    plan = plan_of(toy_plan, public, train=train, lora={"rank": 2}, local=local, **changes)
    simulate(plan, tmp_path / "whole", device="cpu")
    play_killed(cotune, plan, tmp_path / "other", MOMENTS)
    assert tensors_of(tmp_path / "other") == tensors_of(tmp_path / "whole")
    for name in ("org-1", "org-2"):
        model = Path("sites") / name / "model" / "model.safetensors"
        assert (tmp_path / "other" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"public": {"source": ""}},
        {"strategy": "feddf"},
        {"strategy": "ties"},
        {"strategy": "fedadam"},
        {"strategy": "scaffold"},
        {"strategy": {"server_optimizer": {"name": "sgd", "lr": 0.5}}},
        {"strategy": {"weighting": "inverse_loss"}},
        {"client_privacy": {"epsilon": 8.0, "delta": 1e-3}},
        {"personal": ["head"], "train": "lora"},
        {"personal": "ditto"},
        {"server": {"late": "fold"}},
        {"disclosures": {"local_metrics": True}},
        {"wire": "int8"},
        {"wire_down": "bfloat16"},
        {"train": "lora", "lora": {"rank": 4, "smaller_ranks": True}},
        {"task": "regression", "model": {"target_range": [1.0, 5.0]}},
        {"collaboration": "parameters", "simulation": {"bases": ["a", "b"]}},
    ],
)
def test_plans_that_cannot_share_predictions_are_refused(toy_plan: NewPlan, public: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CotuneError) as caught:
        plan_of(toy_plan, public, **changes)
    assert caught.value.code == "plan.invalid"
