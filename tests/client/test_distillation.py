"""Distillation on private records: what is learned, what is charged and when, and what a kill leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.client import distillation
from cotune.client.distillation import PrivateDistillation, ask_teachers, distill_privately, mix_targets, pin_student
from cotune.client.local_events import observe_client
from cotune.client.site import Site
from cotune.client.site_setup import set_base_model
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.soft_labels import SoftLabels
from cotune.errors import PlanError, PolicyError, RunError
from cotune.models.base.folder import content_hash
from cotune.models.evaluation.predictor import open_predictor
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, change_policy
from tests.support.exported_models import export_random
from tests.support.failures import fails_with
from tests.support.kills import Killed, killed_before_each_change
from tests.support.oracle_epsilon import oracle_epsilon
from tests.support.stacked import export_fitted

NewPlan = Callable[..., Plan]
NewSite = Callable[..., Site]
LABELS = ("bad", "good", "so")
PRIVATE = {"epsilon": 8.0, "delta": 1e-3}


@pytest.fixture(scope="module")
def teachers(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("teachers")
    first = export_random(base_model("bert"), folder / "first", LABELS, seed=1)
    second = export_random(base_model("gpt2"), folder / "second", ("so", "bad", "good"), seed=2)
    return [str(first), str(second)]


@pytest.fixture
def student(make_plan: NewPlan) -> NewPlan:
    def make(kind: str = "distilbert", **changes: Any) -> Plan:
        return pin_student(make_plan(kind, **{"rounds": 2, "privacy": PRIVATE, **changes}))

    return make


def work_of(plan: Plan, site: Site, teachers: list[str], out: Path, label_weight: float = 0.5) -> PrivateDistillation:
    return PrivateDistillation(plan, site, teachers, label_weight, out)


def test_targets_are_what_each_teacher_says_of_the_record(student: NewPlan, make_site: NewSite, teachers: list[str]) -> None:
    plan = student()
    dataset = make_site().counted_dataset(plan)
    said = [torch.cat(open_predictor(name, "cpu").probabilities(dataset.inputs())).numpy() for name in teachers]
    said[1] = said[1][:, [1, 2, 0]]
    found = ask_teachers(plan, teachers, torch.device("cpu"), dataset)
    assert found.numpy() == pytest.approx(np.mean(said, axis=0), abs=1e-5)


def test_targets_depend_on_their_record_alone(student: NewPlan, make_site: NewSite, teachers: list[str]) -> None:
    """To the bit: with ten records fewer beside it, a record is taught the same."""
    plan = student()
    whole, part = (make_site(at=at, rows=range(rows)).counted_dataset(plan) for at, rows in (("all", 60), ("some", 50)))
    expected = dict(zip(whole.inputs(), ask_teachers(plan, teachers, torch.device("cpu"), whole), strict=True))
    found = dict(zip(part.inputs(), ask_teachers(plan, teachers, torch.device("cpu"), part), strict=True))
    assert len(found) == 50
    assert all(torch.equal(expected[text], row) for text, row in found.items())


def test_labels_are_mixed_in_and_what_was_not_read_has_none() -> None:
    taught = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [torch.nan] * 3])
    found = mix_targets(taught, [0, IGNORED, 1], 0.5)
    assert found[:2].numpy() == pytest.approx(np.array([[0.6, 0.15, 0.25], [0.2, 0.3, 0.5]]))
    assert (found[2] == IGNORED).all()


def test_loss_is_the_divergence_and_gives_the_same_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    taught = torch.rand(4, 3, generator=generator, dtype=torch.float64).softmax(dim=1)
    taught[3] = IGNORED
    losses = SoftLabels(3).losses_from_scores(scores, taught)
    (found,) = torch.autograd.grad(losses.sum(), scores)
    assert found[:3].numpy() == pytest.approx((scores.softmax(dim=1) - taught)[:3].detach().numpy())
    assert (losses[3].item(), found[3].abs().sum().item()) == (0.0, 0.0)


def test_student_is_charged_what_composition_says(
    student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path
) -> None:
    plan = student()
    site = make_site()
    found = distill_privately(work_of(plan, site, teachers, tmp_path / "out"))
    charged = site.ledger().spent(plan.plan_id)
    assert found["steps"] == sum(steps.count for steps in charged) == 8
    assert found["epsilon"] == pytest.approx(oracle_epsilon(charged, PRIVATE["delta"]), abs=0.02)
    assert 0 < found["epsilon"] <= PRIVATE["epsilon"]
    assert {charge.state for charge in site.ledger().charges()} == {"settled"}
    assert site.ledger().seconds(plan.plan_id) > 0  # which the policy's hours are about
    opened = open_predictor(str(tmp_path / "out"), "cpu")
    assert opened.labels == LABELS
    base = open_predictor(str(tmp_path / "out"), "cpu").model.loaded.module.config.model_type
    assert base == "distilbert"
    assert "ε at most 8" in (tmp_path / "out" / "README.md").read_text()


def test_student_learns_what_a_teacher_says(
    student: NewPlan, make_site: NewSite, base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """With little noise, it comes nearer to a teacher of its kind than any constant does."""
    teacher = str(export_fitted(base_model("bert"), tmp_path / "teacher", LABELS, seed=11, pooling="mean", scale=10.0))
    local = {"steps": 30, "batch_size": "all", "learning_rate": 4.0}
    plan = student("bert", model={"pooling": "mean"}, privacy={"epsilon": 100.0, "delta": 1e-3}, local=local)
    site = make_site()
    dataset = site.counted_dataset(plan)
    taught = ask_teachers(plan, [teacher], torch.device("cpu"), dataset)
    distill_privately(work_of(plan, site, [teacher], tmp_path / "out", 0.0))
    said = torch.cat(open_predictor(str(tmp_path / "out"), "cpu").probabilities(dataset.inputs()))
    constant = taught.mean(dim=0).expand_as(taught)
    assert _divergence(taught, said) < 0.6 * _divergence(taught, constant)


def _divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * (one.double().log() - other.double().log())).sum(dim=1).mean())


def test_nothing_is_trained_that_the_ledger_does_not_allow(
    student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path
) -> None:
    site = make_site(policy=change_policy(Policy.permissive(), {"budget.epsilon_total": 1e-6}))
    steps: list[Any] = []
    with observe_client(lambda what, fields: steps.append(what)), pytest.raises(PolicyError):
        distill_privately(work_of(student(), site, teachers, tmp_path / "out"))
    assert "step" not in steps
    assert not (tmp_path / "out").exists()


def test_policy_has_the_last_word(student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path) -> None:
    site = make_site(policy=change_policy(Policy.permissive(), {"training.train_modes": ["lora"]}))
    with pytest.raises(PolicyError) as caught:
        distill_privately(work_of(student(), site, teachers, tmp_path / "out"))
    assert caught.value.rule == "training.train_modes"


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": "none"},
        {"train": "lora"},
        {"train": "full"},
        {"labels": []},
        {"class_weights": {"bad": 2.0}},
        {"local": {"base_decay": 0.1}},
        {"strategy": "fedprox"},
        {"personal": {"method": "ditto"}},
    ],
)
def test_plans_of_something_else_are_refused(
    student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    site = make_site()
    plan = student(**changes)
    with pytest.raises(PlanError) as caught:
        distill_privately(work_of(plan, site, teachers, tmp_path / "out"))
    assert caught.value.code == "plan.no_distillation"
    assert not site.ledger_file.exists()


@pytest.mark.parametrize("weight", [float("nan"), -0.1, 1.1])
def test_label_weight_that_is_none_is_refused(
    student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path, weight: float
) -> None:
    """Before anything is charged."""
    site = make_site()
    with fails_with("plan.label_weight"):
        distill_privately(work_of(student(), site, teachers, tmp_path / "out", weight))
    assert not site.ledger_file.exists()


def test_other_teachers_need_another_plan(student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path) -> None:
    plan = student()
    site = make_site()
    distill_privately(work_of(plan, site, teachers, tmp_path / "out"))
    for changed in (work_of(plan, site, teachers[:1], tmp_path / "new"), work_of(plan, site, teachers, tmp_path / "new", 0.1)):
        with pytest.raises(RunError) as caught:
            distill_privately(changed)
        assert caught.value.code == "run.other_settings"
    assert sum(steps.count for steps in site.ledger().spent(plan.plan_id)) == 8


def test_student_is_the_plans_whatever_base_the_site_has(
    student: NewPlan,
    make_site: NewSite,
    make_plan: NewPlan,
    teachers: list[str],
    base_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """`cotune client join --model FOLDER` names the base model of a federation."""
    site = set_base_model(make_site(), make_plan("bert"), base_model("bert"))
    distill_privately(work_of(student("distilbert"), site, teachers, tmp_path / "out"))
    assert open_predictor(str(tmp_path / "out"), "cpu").model.loaded.module.config.model_type == "distilbert"


def test_folder_that_cannot_be_written_costs_nothing_more(
    student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path
) -> None:
    """One that others have made meanwhile is left as it is."""
    site = make_site()
    plan = student()
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")

    def intrude(what: str, fields: dict[str, Any]) -> None:
        if what == "step":
            out.mkdir(exist_ok=True)
            (out / "own.txt").write_text("mine")

    with observe_client(intrude), fails_with("run.folder_exists"):
        distill_privately(work_of(plan, site, teachers, out))
    assert [file.name for file in out.iterdir()] == ["own.txt"]
    with fails_with("run.not_writable"):
        distill_privately(work_of(plan, site, teachers, tmp_path / "file" / "out"))
    found = distill_privately(work_of(plan, site, teachers, tmp_path / "new"))
    assert found["steps"] == 8


@pytest.mark.crash
def test_killed_in_training_is_charged_again(student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path) -> None:
    """The charge is there at the first step, and what is left pays for the second attempt with more noise."""
    plan = student()
    site = make_site()
    work = work_of(plan, site, teachers, tmp_path / "out")

    def kill(what: str, fields: dict[str, Any]) -> None:
        if what == "step":
            raise Killed

    with observe_client(kill), pytest.raises(Killed):
        distill_privately(work)
    assert [steps.count for steps in site.ledger().spent(plan.plan_id)] == [4]
    found = distill_privately(work)
    charged = site.ledger().spent(plan.plan_id)
    assert found["steps"] == 12
    assert oracle_epsilon(charged, PRIVATE["delta"]) <= PRIVATE["epsilon"] + 0.01


@pytest.mark.crash
def test_killed_at_any_change_of_a_file_ends_with_one_student(
    student: NewPlan, make_site: NewSite, teachers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached student is exported unchanged, to the bit, at no cost; without one the student is trained again."""
    plan = student(rounds=1)
    site = make_site()
    before = Path(shutil.copytree(site.folder, tmp_path / "before"))
    work = work_of(plan, site, teachers, tmp_path / "out")
    kept: list[bytes] = []
    for _ in killed_before_each_change(monkeypatch, lambda: distill_privately(work)):
        files = sorted(site.kept_folder(plan.plan_id, distillation._KEPT).glob("*.safetensors"))
        kept += [file.read_bytes() for file in files]
        if not files:
            shutil.rmtree(site.folder)
            shutil.copytree(before, site.folder)
    assert len(kept) > 1
    assert len(set(kept)) == 1
    assert [steps.count for steps in site.ledger().spent(plan.plan_id)] == [4]
    distill_privately(work_of(plan, site, teachers, tmp_path / "again"))
    assert content_hash(tmp_path / "again") == content_hash(tmp_path / "out")
