"""Gradients of single records against one record at a time, for each task on the setup that trains; records keep to themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cotune.client.training.checks.gradient_checks import check_stages
from cotune.client.training.stage_setup.from_records import synthetic_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.errors import PrivacyError
from cotune.models.trainable import TrainableModel
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, stage_names
from cotune.privacy.mechanisms.per_example import per_example
from tests.support.paired_models import PAIRED, paired_model, pairs_table
from tests.support.simulations import merged
from tests.support.text_tasks import LABELS, table_of

__all__ = ["paired_model"]  # fixtures
NewPlan = Callable[..., Plan]
RECORDS = 5


@pytest.fixture
def new_plan(base_model: Callable[[str], Path], paired_model: Callable[[str], Path]) -> NewPlan:
    def make(task: str, kind: str, mode: str, **changes: Any) -> Plan:
        if task == "seq2seq":
            return parse_plan(merged({**pairs_table(kind, paired_model(kind), Path("unused.jsonl")), "train": mode}, changes))
        table = table_of(task, base_model(kind), Path("unused.jsonl"))
        table["model"] |= {"pooling": "auto"}
        table["labels"] = list(LABELS) if task == "multi-label" else []
        return parse_plan(merged({**table, "train": mode}, changes))

    return make


def prepare(plan: Plan) -> tuple[TrainableModel, TrainingSetup, tuple[torch.nn.Parameter, ...]]:
    model = get_plan_model(plan, "cpu")
    (stage,) = plan.stages
    trained = tuple(model.train_only(stage_names(plan, stage, model)))
    return model, synthetic_setup(plan, stage, model, RECORDS), trained


def together(setup: TrainingSetup) -> Iterator[tuple[int, list[Tensor]]]:
    """(row, its gradients) as training takes them."""
    for positions, batch in setup.batches(range(RECORDS)):
        with per_example(setup.module, setup.loss) as of:
            _, found = of.gradients(batch)
        for slot, row in enumerate(positions):
            yield row, [each[slot] for each in found]


@pytest.mark.parametrize(("mode", "checkpointing"), [("lora", "off"), ("lora", "on"), ("full", "off")])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_gradients_are_those_of_single_records(
    new_plan: NewPlan, task: str, kind: str, mode: str, precision: str, tolerance: float, checkpointing: str
) -> None:
    plan = new_plan(task, kind, mode, model={"precision": precision}, local={"activation_checkpointing": checkpointing})
    check_gradients_of(plan, tolerance)


def check_gradients_of(plan: Plan, tolerance: float) -> None:
    mode = plan.stages[0].mode
    model, setup, trained = prepare(plan)
    names = [name for name, p in model.parameters() if p.requires_grad]
    with model.with_random_weights(names if mode == "lora" else ()):
        for row, found in together(setup):
            alone = torch.autograd.grad(setup.loss(setup.alone(row)).sum(), trained)
            ours, theirs = (torch.cat([each.flatten() for each in some]) for some in (found, alone))
            assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())
            assert theirs.any()


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("kind", PAIRED)
def test_gradients_of_pairs_are_those_of_single_records(
    new_plan: NewPlan, kind: str, precision: str, tolerance: float, checkpointing: str
) -> None:
    plan = new_plan("seq2seq", kind, "lora", model={"precision": precision}, local={"activation_checkpointing": checkpointing})
    check_gradients_of(plan, tolerance)


@pytest.mark.parametrize("kind", ["t5", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("bart", "marian"))])
def test_what_a_run_checks_of_pairs_holds(new_plan: NewPlan, kind: str) -> None:
    for mode in ("lora", "full"):
        plan = new_plan("seq2seq", kind, mode)
        check_stages(plan, get_plan_model(plan, "cpu"))


def test_tied_tables_of_pairs_are_trained_by_nobody(new_plan: NewPlan) -> None:
    plan = new_plan("seq2seq", "bart", "lora", train=[{"mode": "full", "rounds": 1, "freeze_embeddings": False}])
    with pytest.raises(PrivacyError) as raised:
        check_stages(plan, get_plan_model(plan, "cpu"))
    assert raised.value.code == "privacy.tied_weights"


def test_checkpointing_of_trained_layers_is_refused(new_plan: NewPlan) -> None:
    """They run twice, of which Opacus sees one too many: fails closed, before any record is touched."""
    plan = new_plan("regression", "bert", "full", local={"activation_checkpointing": "on"})
    with pytest.raises(PrivacyError) as raised:
        check_stages(plan, get_plan_model(plan, "cpu"))
    assert raised.value.code == "privacy.no_per_example_gradients"


@pytest.mark.parametrize("mode", ["head", "lora"])
@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_what_a_run_checks_of_a_task_holds(new_plan: NewPlan, task: str, mode: str) -> None:
    """Clipped sums, padding, and the independence of records, as before every run with privacy."""
    plan = new_plan(task, "bert", mode)
    model = get_plan_model(plan, "cpu")
    check_stages(plan, model)
