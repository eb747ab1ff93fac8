"""Tags beside other tasks under DP-SGD: one draw, one clip over all heads and the shared part, one gradient for each record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cotune.client.training.checks.gradient_checks import check_gradients, check_stages
from cotune.data.multi_task import task_of
from cotune.models.trainable import TrainableModel
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.config import RecordPrivacy
from tests.support.multi_task import TAGGED, NewPlan, write_tagged
from tests.support.multi_task_training import check_clipped_sum, clipped_sum, norm, prepared

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
    check_clipped_sum(given, expected)


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
