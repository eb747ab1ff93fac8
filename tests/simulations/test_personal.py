"""A run without a common model: A is shared, every organization keeps its B and its head."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from cotune.cli.simulate import show
from cotune.client.site import Site
from cotune.client.training.personal.parameters import PERSONAL
from cotune.errors import PlanError
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.reporting.verdict import conclude_verdict
from cotune.server.runs.events import observe_run
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.run import Run, resume, simulate
from tests.support.simulations import NewPlan, same


def plan_of(toy_plan: NewPlan, **changes: Any) -> Plan:
    given = {"train": "lora", "lora": {"rank": 2}, "strategy": "fedsa", "local": {"learning_rate": 1.0, "momentum": 0.0}}
    return toy_plan(**{**given, **changes})


def own_models(result: Run) -> dict[str, dict[str, torch.Tensor]]:
    """The exported model of each organization."""
    found = sorted((result.folder / "sites").glob("*/model/model.safetensors"))
    return {file.parts[-3]: load_file(file) for file in found}


@pytest.fixture(scope="module")
def finished(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = plan_of(toy_plan, simulation={"baselines": ["alone", "pooled"]})
    return simulate(plan, tmp_path_factory.mktemp("personal") / "run", device="cpu")


def test_every_organization_has_a_model_and_the_run_has_none(finished: Run) -> None:
    models = own_models(finished)
    assert list(models) == ["org-1", "org-2"]
    assert not (finished.folder / "model").exists()
    assert not torch.equal(models["org-1"]["classifier.weight"], models["org-2"]["classifier.weight"])
    loaded = AutoModelForSequenceClassification.from_pretrained(finished.folder / "sites" / "org-1" / "model")
    assert torch.equal(loaded.classifier.weight.detach(), models["org-1"]["classifier.weight"])


def test_an_exported_model_is_the_common_a_with_the_own_b(finished: Run) -> None:
    folder = RunFolder(finished.folder)
    state = folder.load().state
    model = get_plan_model(folder.plan, "cpu")
    assert all(".lora_A." in name for name in state)
    model.load({})
    base = {name: p.detach().clone() for name, p in model.parameters()}
    for name, exported in own_models(finished).items():
        own = Site(finished.folder / "sites" / name).load_state(folder.plan.plan_id, 3, PERSONAL)
        for adapter in model.adapters():
            expected = base[adapter.weight] + adapter.scale * own[adapter.b] @ state[adapter.a]
            torch.testing.assert_close(exported[adapter.weight], expected)


def test_the_summary_has_each_model_and_the_mean(finished: Run) -> None:
    summary = finished.summary
    each = [organization["personal"]["accuracy"] for organization in summary["organizations"]]
    assert summary["test"]["federated"]["accuracy"] == pytest.approx(sum(each) / 2)
    assert summary["rounds"][-1]["metrics"]["accuracy"] == pytest.approx(sum(each) / 2)
    assert min(each) > summary["test"]["majority"]["accuracy"] + 0.05  # they have learnt something
    for organization, accuracy in zip(summary["organizations"], each, strict=True):
        assert organization["common"]["federated"]["accuracy"] == pytest.approx(accuracy)
        own = organization["own"]
        assert organization["gain"] == pytest.approx(own["federated"]["accuracy"] - own["alone_without_privacy"]["accuracy"])
        assert own["adapted"] is None  # it is its own already
    assert summary["test"]["pooled"]["accuracy"] >= summary["test"]["majority"]["accuracy"]


def test_the_report_says_that_there_is_no_common_model(finished: Run) -> None:
    verdict = conclude_verdict(finished.summary)
    assert any("each organization's own model reaches, in the mean," in note for note in verdict.notes)
    assert verdict.notes[0].startswith("There is no common model")
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert "There is no common model" in page
    assert "each with its own model, mean of this run" in page


def test_the_console_names_the_folders_of_the_models(finished: Run) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    show(console, finished)
    text = console.export_text()
    assert "federated (own models, mean of this run)" in text
    assert str(finished.folder / "sites/*/model") in text


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(toy_plan: NewPlan, finished: Run, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(event: str, fields: dict[str, Any]) -> None:
        if event == "update_received" and (fields["round"], fields["organization"]) == (3, "org-1"):
            raise Interrupted

    with pytest.raises(Interrupted), observe_run(interrupt):
        simulate(plan_of(toy_plan, simulation={"baselines": ["alone", "pooled"]}), tmp_path / "run", device="cpu")
    again = own_models(resume(tmp_path / "run"))
    for name, model in own_models(finished).items():
        assert same(again[name], model)


def test_private_run_with_sampled_clients_and_smaller_ranks(toy_plan: NewPlan, tmp_path: Path) -> None:
    simulation = {"clients": 3, "ranks": [1, 2, 2], "baselines": []}
    server = {"sample_rate": 0.6}
    plan = plan_of(toy_plan, privacy={"epsilon": 8.0}, rounds=4, simulation=simulation, server=server)
    result = simulate(plan, tmp_path / "run", device="cpu")
    asked = {name for entry in result.summary["rounds"] for name in entry["participants"]}
    assert all(entry["dropped"] == [] for entry in result.summary["rounds"])
    assert {
        name for name, o in zip(["org-1", "org-2", "org-3"], result.summary["organizations"], strict=True) if o["personal"]
    } == asked
    assert set(own_models(result)) == asked


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "fedsa", "lora": {"factors": "b"}}, r'is for lora\.factors = "ab", and the plan has "b"'),
        ({"strategy": {}, "lora": {"keep": "b"}}, r'lora\.keep = "b" shares A alone, and lora\.factors = "b": expected "ab"'),
        (
            {"train": "head", "strategy": {}, "lora": {"keep": "b", "factors": "ab"}},
            r"keeps the head of every organization apart: expected train = lora in all rounds",
        ),
        ({"train": [{"mode": "lora", "rounds": 1}, {"mode": "full", "rounds": 1}]}, r"expected train = lora in all rounds"),
        ({"strategy": "flora", "lora": {"keep": "b"}}, r'"flora" is about whole models, and the plan leaves a part'),
        ({"strategy": "fedit", "lora": {"keep": "b"}}, r'"fedit" is about whole models'),
    ],
)
def test_plans_that_cannot_keep_a_part_at_home(toy_plan: NewPlan, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan_of(toy_plan, **changes)
