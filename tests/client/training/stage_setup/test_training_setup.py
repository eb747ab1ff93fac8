"""Sums over all rows of a training setup: each unit counts for one, and what did not fit into memory is not counted twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.models.physical_batch import PhysicalBatch
from cotune.privacy.mechanisms.per_example import Batch

VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
RECORDS = [[row] for row in range(6)]


def make(units: Sequence[Sequence[int]] = RECORDS, least: int | None = 1) -> TrainingSetup:
    """Batches of four slots, the last of which are blank, of a value for each row."""
    physical = PhysicalBatch(4, torch.device("cpu"), least)

    def batches(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Any]]:
        for start in range(0, len(rows), physical.rows):
            chosen = list(rows)[start : start + physical.rows]
            blank = torch.full((physical.rows - len(chosen),), 1e6)
            yield chosen, {"x": torch.cat([VALUES[chosen], blank])}

    def unused(*_: Any) -> Any:
        raise AssertionError("no sum needs this")

    return TrainingSetup(nn.Linear(1, 1), 6, units, batches, unused, unused, unused, unused, unused, unused, physical)


def test_blank_slots_are_left_out() -> None:
    assert make().sum_over_units(lambda batch: batch["x"]) == 63.0


def test_of_a_unit_the_mean_counts() -> None:
    assert make([[0, 1, 2], [3], [4, 5]]).sum_over_units(lambda batch: batch["x"]) == pytest.approx(7 / 3 + 8 + 24)


@pytest.mark.parametrize("failing", [[2], [1, 2], [2, 4]], ids=str)
def test_rows_before_a_failure_are_not_counted_twice(failing: list[int]) -> None:
    calls: list[int] = []

    def figure(batch: Batch) -> Tensor:
        calls.append(len(batch["x"]))
        if len(calls) in failing:
            raise torch.OutOfMemoryError
        return batch["x"]

    setup = make()
    assert setup.sum_over_units(figure) == 63.0
    assert setup.physical.rows == (4 if len(failing) == 1 else 2)


def test_another_failure_is_not_tried_again() -> None:
    def figure(batch: Batch) -> Tensor:
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        make().sum_over_units(figure)
