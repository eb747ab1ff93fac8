"""Tags beside other tasks under DP-SGD: one draw, one clip over all heads and the shared part, one gradient for each record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.client.training.checks.gradient_checks import check_gradients, check_stages
from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.multi_task import task_of
from cotune.data.record_reading import read_records
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.clipped_sum import ClippedSum
from cotune.privacy.mechanisms.per_example import per_example, unit_gradients
from tests.support.multi_task import TAGGED, NewPlan, write_tagged

PEOPLE = {"privacy": {"epsilon": 2.0, "delta": 1e-3, "unit": "person", "max_records": 4}}
RECORDS = {"privacy": {"epsilon": 2.0, "delta": 1e-3}}
MODES = {"lora": {"train": "lora"}, "full": {"train": "full"}}
KINDS = ("bert", pytest.param("distilbert", marks=pytest.mark.long), "gpt2")
WEIGHTS = {"mood": 1.0, "length": 0.5, "words": 2.0}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


@pytest.fixture
def few(tmp_path: Path) -> dict[str, str]:
    return {"source": str(write_tagged(tmp_path / "few.csv", count=24, people=8))}


def prepared(plan: Plan) -> tuple[TrainableModel, list[nn.Parameter], TrainingSetup, Dataset]:
    """The setting of an organization with all records, and with the parameters away from where they start."""
    model = get_plan_model(plan, "cpu")
    names = model.names(plan.get_stage(1).mode)
    model.load({})
    generator = torch.Generator().manual_seed(5)
    state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()}
    model.load(state)
    parameters = model.train_only(names)
    records = read_records(plan.data, task=plan.task)
    held = Dataset(((records, np.arange(len(records))),), plan.labels, plan.task, tasks=tuple(WEIGHTS))
    held = held.bound_contributions(plan.privacy, plan.seed)
    return model, parameters, build_setup(plan, plan.get_stage(1), model, held, state, "clinic", expected_batch=4), held


def by_hand(model: TrainableModel, words: Sequence[str], names: Sequence[str]) -> Tensor:
    """Σ λ_i ℓ_i of a record alone, from its words and labels: each task's classifier of transformers reads the running text."""
    reader = model.loaded.reader
    read = reader([" ".join(words)], truncation=True, max_length=model.loaded.max_length, return_tensors="pt")
    inputs = {"input_ids": read["input_ids"], "attention_mask": torch.ones_like(read["input_ids"])}
    length = inputs["input_ids"].shape[1]
    if model.loaded.module.config.model_type in ("bert", "distilbert", "gpt2"):
        inputs["position_ids"] = torch.arange(length)[None]
    total = torch.zeros(())
    for task, weight in WEIGHTS.items():
        classes = [label for label in TAGGED if task_of(label) == task]
        own = [classes.index(name) for name in names if task_of(name) == task]
        if not own:
            continue
        scores = model.loaded.module.classifier(task)(**inputs).logits[0]  # type: ignore[operator]
        if task == "words":
            begins = [first_token(read, words, place) for place in range(len(words))]
            seen = [(begin, tag) for begin, tag in zip(begins, own, strict=True) if begin is not None]
            scores = scores[[begin for begin, _ in seen]]
            own = [tag for _, tag in seen]
        else:
            scores = scores[None]
        total = total + weight * functional.cross_entropy(scores, torch.tensor(own))
    return total


def first_token(read: object, words: Sequence[str], place: int) -> int | None:
    """The first token of a word, by the character that it begins with."""
    found: int | None = read.char_to_token(0, len(" ".join(words[:place])) + (place > 0))  # type: ignore[attr-defined]
    return found


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


def clipped_sum(given: TrainingSetup, units: Sequence[Sequence[int]], clip: float) -> list[Tensor]:
    with per_example(given.module, given.loss) as gradients:
        found = ClippedSum(gradients.parameters, clip, 0.0, "flat")
        for block, _ in unit_gradients(gradients, units, given.batches):
            found.add(block)
        return [tensor.clone() for tensor in found.totals()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_clipped_sum_is_that_of_a_loop_over_units(tagged_plan: NewPlan, few: dict[str, str], kind: str, mode: str) -> None:
    """Of each person the gradients of all records in all tasks are added, and clipped once over all heads and the shared part."""
    plan = tagged_plan(kind, data=few, **PEOPLE, **MODES[mode])
    model, parameters, given, held = prepared(plan)
    inputs = held.inputs()
    expected = []
    for unit in given.units:
        losses = [by_hand(model, inputs[row], held.held_labels[row]) for row in unit]
        total = sum(losses, torch.zeros(()))
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        expected.append(
            [torch.zeros_like(p).double() if g is None else g.double() for g, p in zip(found, parameters, strict=True)]
        )
    norms = sorted(map(norm, expected))
    clip = norms[len(norms) // 2] * 0.99  # some are clipped and some are not
    total = [sum((g[i] * min(1.0, clip / norm(g)) for g in expected), torch.zeros(())) for i in range(len(parameters))]
    actual = clipped_sum(given, given.units, clip)
    assert norm([a.double() - e for a, e in zip(actual, total, strict=True)]) < 1e-5 * norm(total)


@pytest.mark.parametrize("privacy", [PEOPLE, RECORDS], ids=["people", "records"])
def test_a_unit_with_tags_changes_the_sum_by_one_clip_norm(
    tagged_plan: NewPlan, few: dict[str, str], privacy: dict[str, dict[str, float]]
) -> None:
    """Without it the sum over the others is the same to the bit, and all of what it adds, in all heads, is C at most."""
    plan = tagged_plan(data=few, train="full", **privacy)
    model, _, given, _ = prepared(plan)
    names = model.names("full")
    clip = 1e-3  # all are clipped
    whole = clipped_sum(given, given.units, clip)
    every = 0
    for left_out in range(0, len(given.units), 3):
        rest = clipped_sum(given, [unit for i, unit in enumerate(given.units) if i != left_out], clip)
        apart = {name: w - r for name, w, r in zip(names, whole, rest, strict=True)}
        assert norm(list(apart.values())) <= clip * (1 + 1e-6)
        every += all(any(bool(apart[n].abs().max() > 0) for n in names if n.startswith(f"head_{task}.")) for task in WEIGHTS)
    assert every, "some unit is in all tasks"


def test_a_record_without_tags_leaves_their_head_alone(tagged_plan: NewPlan, few: dict[str, str]) -> None:
    model, parameters, given, held = prepared(tagged_plan(data=few, **RECORDS))
    row = next(i for i, label in enumerate(held.held_labels) if not any(task_of(name) == "words" for name in label))
    gradients = torch.autograd.grad(given.loss(given.alone(row)).sum(), parameters)
    found = dict(zip(model.names("lora"), gradients, strict=True))
    assert all(not g.any() for name, g in found.items() if name.startswith("head_words."))
    assert any(g.any() for name, g in found.items() if name.startswith(("head_mood.", "head_length.")))


@pytest.mark.parametrize("kind", [*KINDS, "llama"])
def test_the_checks_before_a_run_pass(tagged_plan: NewPlan, few: dict[str, str], kind: str) -> None:
    plan = tagged_plan(kind, data=few, **RECORDS)
    check_stages(plan, get_plan_model(plan, "cpu"))
    _, _, given, _ = prepared(plan)
    assert isinstance(plan.privacy, RecordPrivacy)
    assert check_gradients(given, plan.privacy, "lora") < 1e-5
