"""Runs in which every organization keeps named parts of the model: the head, or the norms of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cotune.client.site import Site
from cotune.client.training.personal.parameters import PERSONAL
from cotune.errors import PlanError
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.joint_privacy_loss import get_charged_steps
from cotune.simulations.run import Run, simulate
from tests.support.processes import Cotune, Moment, play_killed
from tests.support.simulations import NewPlan, same, tensors_of


def plan_of(toy_plan: NewPlan, parts: Sequence[str], **changes: Any) -> Plan:
    given = {"train": "lora", "lora": {"rank": 2}, "local": {"learning_rate": 1.0, "momentum": 0.0}, "personal": list(parts)}
    return toy_plan("shallow-bert", **{**given, **changes})


def own_models(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The exported model of each organization."""
    return {file.parts[-3]: load_file(file) for file in sorted((folder / "sites").glob("*/model/model.safetensors"))}


@pytest.fixture(scope="module", params=[pytest.param(["head"], marks=pytest.mark.long), ["norm", "head"]], ids="+".join)
def finished(request: pytest.FixtureRequest, toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = plan_of(toy_plan, request.param, privacy={"epsilon": 8.0}, simulation={"baselines": ["plain"]})
    return simulate(plan, tmp_path_factory.mktemp("parts") / "run", device="cpu")


def test_exported_models_are_the_shared_part_with_the_own(finished: Run) -> None:
    folder = RunFolder(finished.folder)
    state = folder.load().state
    assert not (finished.folder / "model").exists()
    model = get_plan_model(folder.plan, "cpu")
    norms = set(model.norm_names())
    kept = {"classifier.weight", "classifier.bias", *(norms if "norm" in folder.plan.personal.parts else ())}
    assert not kept & state.keys()
    exported = own_models(finished.folder)
    assert not torch.equal(exported["org-1"]["classifier.weight"], exported["org-2"]["classifier.weight"])
    for name, tensors in exported.items():
        own = Site(finished.folder / "sites" / name).load_state(folder.plan.plan_id, 3, PERSONAL)
        assert own.keys() == kept
        assert all(torch.equal(tensors[part], own[part]) for part in kept)


def test_gain_is_over_the_same_run_with_everything_shared(finished: Run) -> None:
    gain = finished.summary["personal"]
    each = {
        o["name"]: o["own"]["federated"]["accuracy"] - o["own"]["plain"]["accuracy"] for o in finished.summary["organizations"]
    }
    assert {o["name"]: o["personal_gain"] for o in finished.summary["organizations"]} == pytest.approx(each)
    assert gain["mean_gain"] == pytest.approx(sum(each.values()) / len(each))
    assert gain["worst_gain"] == pytest.approx(min(each.values())) == each[gain["worst"]]
    plain = RunFolder(finished.folder / "baselines" / "plain").plan
    assert not plain.keeps_personal
    assert plain.privacy == RunFolder(finished.folder).plan.privacy
    assert "classifier.weight" in RunFolder(finished.folder / "baselines" / "plain").load().state


def test_epsilon_of_all_models_counts_the_plain_run(finished: Run) -> None:
    steps = get_charged_steps(finished.folder, "org-1")
    own = Site(finished.folder / "sites" / "org-1").ledger().spent()
    assert len(steps) == 2 * len(own)
    for organization in finished.summary["organizations"]:
        assert organization["epsilon_all_models"] > organization["epsilon_spent"]


def test_personal_parts_are_charged_as_plain_training_is(finished: Run) -> None:
    """One clip norm and one account over what is shared and what is personal: the same steps at the same noise."""
    plain = Site(finished.folder / "baselines" / "plain" / "sites" / "org-1").ledger().spent()
    assert Site(finished.folder / "sites" / "org-1").ledger().spent() == plain


@pytest.mark.parametrize("noise", [True, False], ids=["with noise", "without noise"])
def test_copies_stand_beside_the_common_model(toy_plan: NewPlan, tmp_path: Path, noise: bool) -> None:
    """Judged and exported are the copies; the common model is there, too, and the copy without noise says that it stays."""
    personal = {"method": "ditto", "noise": noise}
    plan = toy_plan(personal=personal, privacy={"epsilon": 8.0}, simulation={"baselines": ["plain"]})
    result = simulate(plan, tmp_path / "run", device="cpu")
    folder = RunFolder(result.folder)
    common = load_file(result.folder / "model" / "model.safetensors")
    for name, tensors in own_models(result.folder).items():
        own = Site(result.folder / "sites" / name).load_state(folder.plan.plan_id, 3, PERSONAL)
        assert all(torch.equal(tensors[part], tensor) for part, tensor in own.items())
        assert not torch.equal(tensors["classifier.weight"], common["classifier.weight"])
        card = (result.folder / "sites" / name / "model" / "README.md").read_text(encoding="utf-8")
        assert ("No ε bounds" in card) != noise
    assert result.summary["model"]["common"]
    assert result.summary["personal"] is not None
    each = [organization["personal"]["accuracy"] for organization in result.summary["organizations"]]
    assert result.summary["test"]["federated"]["accuracy"] == pytest.approx(sum(each) / len(each))
    charged = Site(result.folder / "sites" / "org-1").ledger().spent()
    plain = Site(result.folder / "baselines" / "plain" / "sites" / "org-1").ledger().spent()
    assert sum(steps.count for steps in charged) == (2 if noise else 1) * sum(steps.count for steps in plain)
    assert all(organization["epsilon_spent"] <= 8.0 for organization in result.summary["organizations"])


MOMENTS = (
    Moment("renamed", {"path": "*/sites/org-1/kept/*/personal/round-00002.safetensors"}),  # kept, and not yet in the outbox
    Moment("update_received", {"round": 2, "organization": "org-2"}),
    Moment("step", {"round": 3, "organization": "org-1"}, nth=2),
)


@pytest.mark.crash
@pytest.mark.parametrize(
    "personal",
    [
        ["head"],
        pytest.param(["norm"], marks=pytest.mark.long),
        "ditto",
        pytest.param(["adapter"], marks=pytest.mark.long),
        pytest.param({"method": "pfedme", "inner_steps": 2}, marks=pytest.mark.long),
        pytest.param({"parts": ["head"], "order": "own_first"}, marks=pytest.mark.long),
    ],
    ids=["head", "norm", "ditto", "adapter", "pfedme", "own first"],
)
def test_killed_run_ends_as_if_it_had_not_been(toy_plan: NewPlan, cotune: Cotune, tmp_path: Path, personal: Any) -> None:
    plan = plan_of(toy_plan, [], personal=personal, simulation={"baselines": []})
    whole = tmp_path / "whole"
    run = tmp_path / "other"
    simulate(plan, whole, device="cpu")
    play_killed(cotune, plan, run, MOMENTS)
    assert tensors_of(run) == tensors_of(whole)
    models = own_models(whole)
    assert models.keys() == {"org-1", "org-2"}
    assert all(same(tensors, models[name]) for name, tensors in own_models(run).items())
    for site in models:
        one, other = (sorted((folder / "sites" / site / "kept").glob("*/personal/*")) for folder in (run, whole))
        assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
        assert one


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": "head"}, "trains the head alone, so that nothing would be shared"),
        ({"train": [{"mode": "head", "rounds": 1}, {"mode": "lora", "rounds": 1}]}, "nothing would be shared"),
        ({"personal": ["norm"], "train": "head"}, "leaves the encoder and its norms unchanged"),
        ({"personal": ["head", "head"]}, "names a part twice"),
        ({"personal": ["tail"]}, "personal.parts"),
        ({"strategy": "fedsa"}, r"lora\.keep"),
        ({"strategy": "scaffold", "local": {"momentum": 0.0}}, "is about whole models"),
        ({"server": {"late": "fold"}}, "tied to a round"),
    ],
)
def test_plans_that_cannot_keep_these_parts(toy_plan: NewPlan, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said) as refused:
        plan_of(toy_plan, ["head"], **changes)
    assert refused.value.code == "plan.invalid"
