"""Training a head of tags on kept features is training it with the encoder in every step, record by record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.client.training.stage_setup.from_records import _on_examples, build_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.models.encoding import encoded_examples
from cotune.models.physical_batch import PhysicalBatch
from cotune.models.trainable import TrainableModel
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.mechanisms.per_example import per_example

TEXTS = ["great", "the table is very sad and this", "awful road", "a happy day to the tree", "of", "the " * 12]


@pytest.fixture
def plan(base_model: Callable[[str], Path], tmp_path: Path) -> Plan:
    rows = [{"text": t.split(), "label": ["AOB"[(i + j) % 3] for j in range(len(t.split()))]} for i, t in enumerate(TEXTS)]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return parse_plan(
        {
            "task": "token-classification",
            "labels": ("A", "B", "O"),
            "rounds": 1,
            "train": "head",
            "model": {"base": str(base_model("bert")), "max_length": 8, "precision": "float32"},
            "data": {"source": str(tmp_path / "tags.jsonl")},
            "privacy": {"epsilon": 2.0, "delta": 1e-3},
        }
    )


def both(plan: Plan) -> tuple[TrainableModel, TrainingSetup, TrainingSetup]:
    """(model, its setting on features, its setting on examples) of the same records."""
    model = get_plan_model(plan, "cpu")
    stage = plan.get_stage(1)
    model.load({})
    model.train_only(model.names("head"))
    records = read_records(plan.data, task=plan.task)
    held = Dataset(((records, np.arange(len(records))),), plan.labels, plan.task)
    on_features = build_setup(plan, stage, model, held, {}, "clinic", expected_batch=4)
    return (
        model,
        on_features,
        _on_examples(plan, stage, model, encoded_examples(held, model), held.units, PhysicalBatch(32, model.device)),
    )


def seen(given: TrainingSetup) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """(losses, gradients as rows, which are right) of the records in their order."""
    losses = torch.zeros(given.rows)
    gradients: dict[int, torch.Tensor] = {}
    right = [False] * given.rows
    with per_example(given.module, given.loss) as of:
        for positions, batch in given.batches(range(given.rows)):
            found, parts = of.gradients(batch)
            for slot, row in enumerate(positions):
                losses[row] = found[slot]
                gradients[row] = torch.cat([part[slot].flatten() for part in parts])
                right[row] = bool(given.correct(batch)[slot])
    return losses, torch.stack([gradients[row] for row in range(given.rows)]), right


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_head_setup_equals_the_whole_model(plan: Plan) -> None:
    _, on_features, on_examples = both(plan)
    losses, gradients, right = seen(on_features)
    expected_losses, expected_gradients, expected_right = seen(on_examples)
    torch.testing.assert_close(losses, expected_losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)
    assert right == expected_right


def test_a_row_has_the_same_numbers_alone_and_in_any_batch(plan: Plan) -> None:
    _, given, _ = both(plan)
    with torch.no_grad():
        for row in range(given.rows):
            alone = given.loss(given.alone(row))
            ((_, batch),) = given.batches([row])
            torch.testing.assert_close(given.loss(batch)[:1], alone, atol=1e-6, rtol=1e-6)


def test_the_shape_of_a_batch_is_decided_by_each_record_alone(plan: Plan) -> None:
    _, given, _ = both(plan)

    def shapes(rows: list[int]) -> dict[int, Any]:
        return {rows[p]: batch["features"].shape for positions, batch in given.batches(rows) for p in positions}

    everybody = shapes(list(range(given.rows)))
    assert all(shapes([row]) == {row: everybody[row]} for row in range(given.rows))
    assert all(len(positions) < len(batch["labels"]) for positions, batch in given.batches(range(given.rows)))  # one is blank
    given.check_independent_rows()
