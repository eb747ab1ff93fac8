"""Runs that train a meta-model on what the members of a fused model predict: by DP-SGD, at the sites, under their ledgers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cotune.client.site import Site
from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from cotune.ensembles.predictor import open_model
from cotune.models.encoding import encoded_features
from cotune.models.evaluation.predictor import evaluate_classifier
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import Steps
from cotune.server.runs.run_folder import RunFolder
from cotune.server.runs.run_model import final_params
from cotune.simulations.run import Run, simulate
from tests.support.datasets import sentences, write_csv
from tests.support.oracle_epsilon import oracle_epsilon
from tests.support.processes import Cotune, Moment, play_killed, play_whole_and_killed
from tests.support.simulations import NewPlan, tensors_of
from tests.support.stacked import LABELS, export_fitted, stated, write_together

BaseModel = Callable[[str], Path]
Floats = np.ndarray[Any, np.dtype[np.float64]]
ORGANIZATIONS = ("org-1", "org-2")
PRIVATE = {"epsilon": 4.0, "delta": 1e-3}


@pytest.fixture(scope="module")
def together(base_model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of unlike architecture and tokenizer, each fitted to other records."""
    folder = tmp_path_factory.mktemp("members")
    first = export_fitted(base_model("bert"), folder / "first", LABELS, seed=11, pooling="mean")
    second = export_fitted(base_model("gpt2"), folder / "second", ("so", "bad", "good"), seed=12)
    return write_together(folder / "together", [first, second])


@pytest.fixture(scope="module")
def unclear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of which a third have the label of another, so that a logistic regression has a finite optimum."""
    rows = sentences(240)
    others = [label for _, label in sentences(240, seed=9)]
    mixed = [
        (text, other if number % 3 == 0 else label)
        for number, ((text, label), other) in enumerate(zip(rows, others, strict=True))
    ]
    return write_csv(tmp_path_factory.mktemp("data") / "unclear.csv", mixed)


@pytest.fixture(scope="module")
def stacking(toy_plan: NewPlan, together: Path) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        given: dict[str, Any] = {
            "model": {"base": str(together), "pooling": "auto", "members": stated("north", "south"), **changes.pop("model", {})},
            "local": {"learning_rate": 1.0, "momentum": 0.0, "batch_size": "all", "steps": 1},
            "personalize": {"methods": []},
        }
        return toy_plan(**{**given, **changes})

    return make


@pytest.fixture(scope="module")
def private(stacking: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = stacking(privacy=PRIVATE, local={"learning_rate": 0.5, "momentum": 0.0, "batch_size": 0.25, "steps": 3})
    return simulate(plan, tmp_path_factory.mktemp("private") / "run", device="cpu")


def pooled(folder: RunFolder) -> tuple[Floats, np.ndarray[Any, Any]]:
    """(n, members · classes) what the members predict of all organizations' records, and their classes."""
    plan = folder.plan
    model = get_plan_model(plan, "cpu")
    model.load({})
    held = [Site(folder.path / "sites" / name).dataset(plan.labels) for name in ORGANIZATIONS]
    features = np.concatenate([encoded_features(each, model, {}, "float32").numpy() for each in held])
    return features.astype(np.float64), np.concatenate([each.targets for each in held])


def charges(run: Path, name: str) -> list[Steps]:
    return [charge.steps for charge in Site(run / "sites" / name).ledger().charges()]


def softmax(scores: Floats) -> Floats:
    found = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(found / found.sum(axis=1, keepdims=True))


def predicted(folder: RunFolder, features: Floats) -> Floats:
    head = final_params(folder.plan, folder.load())
    return softmax(features @ head["classifier.weight"].double().numpy().T + head["classifier.bias"].double().numpy())


def loss(probabilities: Floats, truth: np.ndarray[Any, Any]) -> float:
    return float(-np.log(probabilities[np.arange(len(truth)), truth]).mean())


def test_meta_model_approaches_scikit_learns(stacking: Callable[..., Plan], unclear: Path, tmp_path: Path) -> None:
    """Without noise, and one step of all records a round: gradient descent on the pooled predictions."""
    strategy = {"server_optimizer": {"name": "sgd", "lr": 1.5, "momentum": 0.9}}
    plan = stacking(rounds=60, data={"source": str(unclear)}, strategy=strategy)
    folder = RunFolder(simulate(plan, tmp_path / "run", device="cpu").folder)
    features, truth = pooled(folder)
    fitted = LogisticRegression(C=np.inf, max_iter=5000, tol=1e-9).fit(features, truth).predict_proba(features)
    began = softmax(features.reshape(len(features), 2, 3).mean(axis=1))
    found = predicted(folder, features)
    assert loss(found, truth) - loss(fitted, truth) < 0.05 * (loss(began, truth) - loss(fitted, truth))
    assert np.abs(found - fitted).mean() < 0.03


def test_ledger_is_charged_what_composition_says(private: Run) -> None:
    plan = RunFolder(private.folder).plan
    for organization in private.summary["organizations"]:
        charged = charges(private.folder, organization["name"])
        assert [steps.count for steps in charged] == [3] * plan.rounds
        expected = oracle_epsilon(charged, PRIVATE["delta"])
        assert organization["epsilon_spent"] == pytest.approx(expected, abs=0.01)
        assert organization["epsilon_spent"] <= PRIVATE["epsilon"]


def test_only_the_meta_model_leaves(private: Run) -> None:
    folder = RunFolder(private.folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in folder.load().state.items()}
    assert shapes == {"classifier.weight": (3, 6), "classifier.bias": (3,)}
    assert any("stacked members" in each for each in private.summary["privacy"]["claim"]["not_covered"])


def test_result_is_a_fused_model(private: Run, toy_data: Path) -> None:
    folder = RunFolder(private.folder)
    opened = open_model(str(private.folder), "cpu")
    found = evaluate_classifier(opened, read_records(DataConfig(source=str(toy_data))))
    assert found["records"] == 240
    assert opened.labels == folder.plan.labels
    document = json.loads((private.folder / "model" / "fusion.json").read_text())
    assert (document["method"], len(document["members"])) == ("stacking", 2)
    features, _ = pooled(folder)
    texts = [
        text for name in ORGANIZATIONS for text in Site(private.folder / "sites" / name).dataset(folder.plan.labels).inputs()
    ]
    assert torch.cat(opened.probabilities(texts)).numpy() == pytest.approx(predicted(folder, features), abs=1e-4)
    card = (private.folder / "model" / "README.md").read_text()
    assert "north was trained before, with ε = 3 at δ = 1e-05" in card
    assert "pipeline(" not in card


@pytest.mark.crash
def test_killed_run_of_stacking_ends_as_if_it_had_not_been(stacking: Callable[..., Plan], cotune: Cotune, tmp_path: Path) -> None:
    plan = stacking(rounds=2)
    moments = (
        Moment("step", {"round": 1, "organization": "org-2"}),
        Moment("update_received", {"round": 2, "organization": "org-1"}),
    )
    whole, run = play_whole_and_killed(cotune, plan, tmp_path, moments)
    assert tensors_of(run) == tensors_of(whole)


@pytest.mark.crash
def test_killed_private_run_is_charged_before_a_record_is_touched(
    stacking: Callable[..., Plan], cotune: Cotune, tmp_path: Path
) -> None:
    """The process ends at the first step of a round: the round is paid for, and paid for again when it is played again."""
    plan = stacking(privacy=PRIVATE, rounds=2)
    play_killed(cotune, plan, tmp_path / "run", (Moment("step", {"round": 1, "organization": "org-1"}),))
    charged = charges(tmp_path / "run", "org-1")
    assert len(charged) == 3
    assert oracle_epsilon(charged, PRIVATE["delta"]) <= PRIVATE["epsilon"] + 0.01
