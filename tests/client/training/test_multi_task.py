"""Several tasks under DP-SGD: a unit's records of all tasks are one draw, one clip over all heads and the shared part, one charge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cotune.client.site import Site
from cotune.client.training.checks.gradient_checks import check_gradients, check_stages
from cotune.client.training.round import train_round
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.multi_task import keep_tasks
from cotune.data.record_reading import read_records
from cotune.data.tasks.classes import IGNORED
from cotune.models.trainable import TrainableModel
from cotune.plan.trained_parameters import get_plan_model, shared_names
from cotune.privacy.config import RecordPrivacy
from cotune.simulations.prepare import make_site, prepare
from tests.support.multi_task import NewPlan, write_tasks
from tests.support.multi_task_training import check_clipped_sum, clipped_sum, norm, prepared

PEOPLE = {"privacy": {"epsilon": 2.0, "delta": 1e-3, "unit": "person", "max_records": 4}}
RECORDS = {"privacy": {"epsilon": 2.0, "delta": 1e-3}}
MODES = {"lora": {"train": "lora"}, "lora with A": {"train": "lora", "lora": {"factors": "ab"}}, "full": {"train": "full"}}
KINDS = ("bert", "distilbert", "gpt2")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


@pytest.fixture
def few(tmp_path: Path) -> dict[str, str]:
    return {"source": str(write_tasks(tmp_path / "few.csv", count=24, people=8))}


def by_hand(model: TrainableModel, given: TrainingSetup, row: int) -> Tensor:
    """Σ λ_i ℓ_i of a record alone: each task's classifier of transformers on it, with the plan's λ of 1 and 0.5."""
    batch = given.alone(row)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    total = torch.zeros(())
    for task, start, weight in (("mood", 0, 1.0), ("length", 3, 0.5)):
        (number,) = [int(label) for label in batch["labels"][0] if start <= label < start + (3 if task == "mood" else 2)] or [
            IGNORED
        ]
        if number != IGNORED:
            scores = model.loaded.module.classifier(task)(**inputs).logits  # type: ignore[operator]
            total = total + weight * functional.cross_entropy(scores, torch.tensor([number - start]))
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_clipped_sum_is_that_of_a_loop_over_units(multi_plan: NewPlan, few: dict[str, str], kind: str, mode: str) -> None:
    """Of each person the gradients of all records in all tasks are added, and clipped once over all heads and the shared part."""
    plan = multi_plan(kind, data=few, **PEOPLE, **MODES[mode])
    model, parameters, given, _ = prepared(plan)
    expected = []
    for unit in given.units:
        losses = [by_hand(model, given, row) for row in unit]
        expected.append([g.double() for g in torch.autograd.grad(sum(losses, torch.zeros(())), parameters, allow_unused=False)])
    check_clipped_sum(given, expected)


@pytest.mark.parametrize("privacy", [PEOPLE, RECORDS], ids=["people", "records"])
def test_a_unit_in_two_tasks_changes_the_sum_by_one_clip_norm(
    multi_plan: NewPlan, few: dict[str, str], privacy: dict[str, dict[str, float]]
) -> None:
    """Without it the sum over the others is the same to the bit, and all of what it adds, in both heads, is C at most."""
    plan = multi_plan(data=few, train="full", **privacy)
    model, _, given, _ = prepared(plan)
    names = model.names("full")
    clip = 1e-3  # all are clipped
    whole = clipped_sum(given, given.units, clip)
    both = 0
    for left_out in range(0, len(given.units), 3):
        rest = clipped_sum(given, [unit for i, unit in enumerate(given.units) if i != left_out], clip)
        apart = {name: w - r for name, w, r in zip(names, whole, rest, strict=True)}
        assert norm(list(apart.values())) <= clip * (1 + 1e-6)
        both += all(
            any(bool(apart[n].abs().max() > 0) for n in names if n.startswith(f"head_{task}.")) for task in ("mood", "length")
        )
    assert both, "some unit is in both tasks"


def test_a_record_of_one_task_leaves_other_heads_alone(multi_plan: NewPlan, few: dict[str, str]) -> None:
    plan = multi_plan(data=few, **RECORDS)
    model, parameters, given, _ = prepared(plan)
    names = model.names("lora")
    row = next(r for r in range(given.rows) if int(given.alone(r)["labels"][0, 0]) == IGNORED)
    gradients = torch.autograd.grad(given.loss(given.alone(row)).sum(), parameters)
    found = dict(zip(names, gradients, strict=True))
    assert all(not g.any() for name, g in found.items() if name.startswith("head_mood."))
    assert any(g.any() for name, g in found.items() if name.startswith("head_length."))


@pytest.mark.parametrize("kind", [*KINDS, "llama", "qwen2"])
def test_the_checks_before_a_run_pass(multi_plan: NewPlan, few: dict[str, str], kind: str) -> None:
    plan = multi_plan(kind, data=few, **RECORDS)
    check_stages(plan, get_plan_model(plan, "cpu"))
    _, _, given, _ = prepared(plan)
    assert isinstance(plan.privacy, RecordPrivacy)
    assert check_gradients(given, plan.privacy, "lora") < 1e-5


def test_an_organization_sends_the_heads_that_it_says_it_holds(multi_plan: NewPlan, tmp_path: Path) -> None:
    """What is sent follows from what the site says, and not from which labels its records have."""
    plan = prepare(multi_plan(privacy={"epsilon": 8.0}, simulation={"tasks": [["mood", "length"], ["length"]]})).plan
    share = prepare(plan).shares[1]
    make_site(tmp_path / "site", "org-2", plan, [share], "cpu")
    model = get_plan_model(plan, "cpu")
    model.load({})
    site = Site(tmp_path / "site")
    assert {label.split("/")[0] for held in site.dataset(plan.labels).held_labels for label in held} == {"length"}
    update = train_round(plan, site, 1, model.state(shared_names(plan, model, 1)))
    assert {name.split(".")[0] for name in update.delta if name.startswith("head_")} == {"head_length"}
    assert any(".lora_B." in name for name in update.delta)
    (charge,) = site.ledger().charges()
    assert charge.steps.count == 3


def test_kept_labels_are_those_of_the_tasks_that_are_held(few: dict[str, str], multi_plan: NewPlan) -> None:
    records = read_records(multi_plan(data=few).data, task="multi-task")
    held = keep_tasks(records, ("length",))
    assert held.inputs == records.inputs
    assert all(
        set(own) == {n for n in every if n.startswith("length/")} for own, every in zip(held.labels, records.labels, strict=True)
    )
