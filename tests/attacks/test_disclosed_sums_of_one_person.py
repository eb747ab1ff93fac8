"""Beside the update, an organization may tell sums over its records: those classified rightly, losses, classes. Their noise is for
the change by one record. A person with k records changed them by k times as much; now each person counts for one in every sum.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cotune.client.training.disclosures import count_correct, total_loss
from cotune.client.training.stage_setup.from_records import build_setup
from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.plan.load import parse_plan
from cotune.plan.trained_parameters import get_plan_model

CEILING = 0.01  # every loss is above it, so that each record counts for all of it


@pytest.mark.parametrize("train", ["head", "lora"])
def test_a_person_counts_for_one(base_model: Callable[[str], Path], tmp_path: Path, train: str) -> None:
    plan = parse_plan(
        {
            "labels": ["bad", "good"],
            "train": train,
            "model": {"base": str(base_model("bert")), "max_length": 16, "pooling": "mean"},
            "data": {"source": "people.csv"},
            "privacy": {"unit": "patient_id", "max_records": 10},
        }
    )
    others = [f"other {i % 7},very sad tree {i},bad" for i in range(21)]
    own = [f"victim,so happy {i},good" for i in range(10)]
    model = get_plan_model(plan, "cpu")
    sums = []
    for name, rows in (("without", others), ("with", [*own, *others])):
        file = tmp_path / f"{name}.csv"
        file.write_text("\n".join(["patient_id,text,label", *rows]), encoding="utf-8")
        records = read_records(DataConfig(source=str(file), unit="patient_id"))
        held = Dataset(((records, np.arange(len(records))),), plan.labels).bound_contributions(plan.privacy, plan.seed)
        model.load({})
        setting = build_setup(plan, plan.stages[0], model, held, {}, name, expected_batch=4.0)
        with torch.no_grad():
            sums.append([*count_correct(setting), total_loss(setting, CEILING) / CEILING, *held.label_counts().values()])
    changes = np.abs(np.subtract(*sums))
    assert changes[1:] == pytest.approx([1, 1, 0, 1])
    assert changes[0] <= 1 + 1e-9
