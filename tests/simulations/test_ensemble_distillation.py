"""Runs whose models are fused by what they predict for public inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cotune.data.unlabeled import inputs_hash
from cotune.ensembles.public_inputs import PublicPredictions, read_public_inputs
from cotune.errors import CotuneError
from cotune.models.features.cached import encode_batch
from cotune.models.features.head import feature_head
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, shared_names
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.run import simulate
from tests.support.datasets import sentences, write_csv
from tests.support.processes import Cotune, Moment, play_killed
from tests.support.simulations import NewPlan, tensors_of

QUICK = {"simulation": {"baselines": []}, "personalize": {"methods": []}}


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "public.csv", sentences(60, seed=5))


def plan_of(toy_plan: NewPlan, source: Path, **changes: Any) -> Plan:
    return toy_plan(**{**QUICK, "strategy": "feddf", "public": {"source": str(source)}, **changes})


def predictions_of(plan: Plan) -> tuple[PublicPredictions, list[str]]:
    model = get_plan_model(plan, "cpu")
    return PublicPredictions(model, read_public_inputs(plan, Path()), "float32", plan.seed), shared_names(plan, model, 1)


def random_state(plan: Plan, names: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    model = get_plan_model(plan, "cpu")
    model.load({})
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in model.state(names).items()}


def test_run_is_one_model_and_states_its_public_inputs(toy_plan: NewPlan, public: Path, tmp_path: Path) -> None:
    plan = plan_of(toy_plan, public, simulation={"baselines": [], "partition": "dirichlet:0.3"})
    run = simulate(plan, tmp_path / "run", device="cpu")
    kept = RunFolder(run.folder).plan
    assert kept.public.sha256 == inputs_hash(read_public_inputs(plan, Path()))
    assert run.summary["test"]["federated"]["accuracy"] > run.summary["test"]["majority"]["accuracy"]


@pytest.mark.parametrize("train", ["head", "lora"])
def test_predictions_are_those_of_the_whole_model(toy_plan: NewPlan, public: Path, train: str) -> None:
    """Of a head they are computed from features; the oracle is the model's own forward pass, one input at a time."""
    plan = plan_of(toy_plan, public, train=train, lora={"rank": 2}, labels=["bad", "good", "so"])
    predictions, names = predictions_of(plan)
    state = random_state(plan, names)
    found = predictions.predict(state, names)
    model = get_plan_model(plan, "cpu")
    model.load(state)
    loaded = model.loaded
    collate = loaded.task.collator(model.module, loaded.reader, model.device)
    with torch.no_grad():
        for row, example in zip(found, loaded.encode_unlabeled(read_public_inputs(plan, Path())), strict=True):
            batch = {key: value for key, value in collate([example]).items() if key != "labels"}
            assert row == pytest.approx(model.module(**batch).logits[0].double(), abs=1e-5)


@pytest.mark.parametrize("train", ["head", "lora"])
def test_distilled_model_predicts_what_it_was_taught(toy_plan: NewPlan, public: Path, train: str) -> None:
    plan = plan_of(toy_plan, public, train=train, lora={"rank": 2}, labels=["bad", "good", "so"])
    predictions, names = predictions_of(plan)
    model = get_plan_model(plan, "cpu")
    model.load({})
    start = model.state(names)
    taught = functional.softmax(predictions.predict(random_state(plan, names), names), dim=1)
    inputs = predictions.of_round(1, start, names)

    def divergence(delta: Mapping[str, Tensor]) -> float:
        scores = functional.log_softmax(inputs.predict(delta), dim=1)
        return float(functional.kl_div(scores, taught, reduction="batchmean"))

    nothing = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    keys = {"temperature": 1.0, "learning_rate": 0.02, "epochs": 30, "batch_size": 20}
    delta = inputs.distill(nothing, taught, **keys)
    assert delta.keys() == set(names)
    assert all(tensor.dtype == torch.float64 for tensor in delta.values())
    assert divergence(delta) < 0.3 * divergence(nothing)
    again = inputs.distill(nothing, taught, **keys)
    assert all(torch.equal(delta[name], again[name]) for name in names)


def test_features_of_a_trained_encoder_are_not_kept(toy_plan: NewPlan, public: Path) -> None:
    """A head stage after a full one: what it reads changes with the state that the round begins with."""
    plan = plan_of(toy_plan, public, labels=["bad", "good", "so"])
    predictions, names = predictions_of(plan)
    model = get_plan_model(plan, "cpu")
    model.load({})
    encoder = next(name for name, p in model.parameters() if name.startswith(model.prefix) and p.dim() == 2)
    head = model.state(names)
    other = {**head, encoder: 2 * model.state([encoder])[encoder]}
    before = predictions.predict(other, names)
    after = predictions.predict(head, names)
    assert not torch.allclose(before, after)
    assert torch.equal(predictions.predict(head, names), after)
    reader = feature_head(model)
    assert reader is not None
    model.load(other)
    features = encode_batch(model, model.loaded.encode_unlabeled(read_public_inputs(plan, Path())), "float32")
    with torch.no_grad():
        assert torch.allclose(reader(features).logits.double(), before, atol=1e-6)


MOMENTS = (
    Moment("update_received", {"round": 1, "organization": "org-2"}),  # all is there, and nothing distilled yet
    Moment("round_finished", {"round": 2}),
    Moment("update_received", {"round": 3, "organization": "org-2"}),
)


@pytest.mark.crash
@pytest.mark.parametrize("train", ["head", pytest.param("lora", marks=pytest.mark.long)])
def test_killed_run_ends_as_if_it_had_not_been(
    toy_plan: NewPlan, cotune: Cotune, public: Path, tmp_path: Path, train: str
) -> None:
    plan = plan_of(toy_plan, public, train=train, lora={"rank": 2}, local={"learning_rate": 1.0, "momentum": 0.0})
    whole = tmp_path / "whole"
    simulate(plan, whole, device="cpu")
    play_killed(cotune, plan, tmp_path / "other", MOMENTS)
    assert tensors_of(tmp_path / "other") == tensors_of(whole)


def test_changed_public_inputs_are_refused(toy_plan: NewPlan, public: Path, tmp_path: Path) -> None:
    plan = plan_of(toy_plan, public, public={"source": str(public), "sha256": "0" * 64})
    with pytest.raises(CotuneError) as caught:
        simulate(plan, tmp_path / "run", device="cpu")
    assert caught.value.code == "data.changed"


@pytest.mark.parametrize(
    ("content", "code"),
    [("label\ngood\n", "data.missing_column"), ("text\n\n\n", "data.no_records"), (None, "data.not_readable")],
)
def test_public_inputs_that_cannot_be_used_are_refused(toy_plan: NewPlan, tmp_path: Path, content: str | None, code: str) -> None:
    file = tmp_path / "there.csv"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(CotuneError) as caught:
        simulate(plan_of(toy_plan, file), tmp_path / "run", device="cpu")
    assert caught.value.code == code
    assert not (tmp_path / "run").exists()


def test_strategy_without_public_inputs_is_refused(toy_plan: NewPlan) -> None:
    with pytest.raises(CotuneError) as caught:
        toy_plan(strategy="feddf")
    assert caught.value.code == "plan.invalid"
