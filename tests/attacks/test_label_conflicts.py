"""One row takes another's place. `deduplicate` kept the first of several labels of a text: a row put before it changed the label
that is trained on, and the sum of gradients by two clip norms instead of one. Now a text with two labels counts in neither.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.privacy.config import RecordPrivacy
from tests.support.movement import movement

CLIP = 0.5


def sum_of(file: Path, deduplicate: bool) -> Tensor:
    records = read_records(DataConfig(source=str(file), deduplicate=deduplicate))
    dataset = Dataset(((records, np.arange(len(records))),), ("x", "y")).bound_contributions(RecordPrivacy(), 7)
    features = torch.tensor([[0.0, 9.0] if "victim" in str(text).lower() else [9.0, 0.0] for text in dataset.inputs()])
    return movement(features, dataset.targets, dataset.units, CLIP)


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("row", ["victim,x", "victim,y", "  victim ,y", "Victim,x", "victim\u200b,y", "victim.,x"])
@pytest.mark.parametrize("first", [True, False])
def test_one_row_changes_the_sum_by_one_clip_norm(tmp_path: Path, deduplicate: bool, row: str, first: bool) -> None:
    rows = ["one,x", "two,y", "three,x", "victim,x", "four,y"]
    sums = []
    for name, table in (("before", rows), ("after", [row, *rows] if first else [*rows, row])):
        file = tmp_path / f"{name}.csv"
        file.write_text("\n".join(["text,label", *table]), encoding="utf-8")
        sums.append(sum_of(file, deduplicate))
    assert float((sums[1] - sums[0]).norm()) <= CLIP * (1 + 1e-3)
