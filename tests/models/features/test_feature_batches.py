"""Batches of features: each record is in one, in a row that it alone chooses, and every batch hides a position."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cotune.data.tasks.text import Example
from cotune.models.features.feature_batches import (
    feature_batches,
    feature_length,
    feature_lengths,
    feature_rows,
    feature_slots,
)
from cotune.models.synthetic_batches import example_probes, stretch_example
from cotune.models.trainable import TrainableModel

Make = Callable[..., TrainableModel]
LONGEST = [2, 7, 8, 20, 23, 32]  # between two lengths, on one, and below one by a token


def with_limit(make: Make, longest: int) -> TrainableModel:
    return make("bert", max_length=longest)


def examples(model: TrainableModel, count: int = 3) -> list[Example]:
    """Some of every length that there is, the long ones first."""
    sample = model.samples[0]
    return [stretch_example(sample, tokens) for tokens in range(model.loaded.max_length, 0, -1) for _ in range(count)]


@pytest.mark.parametrize("longest", LONGEST)
@pytest.mark.parametrize("slots", [2, 5])
def test_every_batch_hides_a_position_and_every_example_is_in_one(shared: Make, longest: int, slots: int) -> None:
    model = with_limit(shared, longest)
    given = examples(model)
    collate = model.loaded.task.collator(model.module, model.loaded.reader, model.device)
    seen = list[int]()
    for rows, length in feature_batches(model, given, slots):
        mask = collate([given[row] for row in rows], length, slots)["attention_mask"]
        assert mask.shape == (slots, length)
        assert not bool(mask.all())
        assert mask[: len(rows)].sum(dim=1).tolist() == [len(given[row]["input_ids"]) for row in rows]
        seen += rows
    assert sorted(seen) == list(range(len(given)))


@pytest.mark.parametrize("longest", LONGEST)
def test_an_example_alone_decides_its_length(shared: Make, longest: int) -> None:
    model = with_limit(shared, longest)
    given = examples(model, 2)
    for rows, length in feature_batches(model, given, 4):
        assert {feature_length(model, given[row]) for row in rows} == {length}
    assert {feature_length(model, example) for example in given} == set(feature_lengths(model))


def test_no_slot_is_wasted_but_in_batches_of_the_longest(shared: Make) -> None:
    model = with_limit(shared, 32)
    assert feature_lengths(model) == (8, 12, 16, 20, 24, 28, 32)
    assert [feature_rows(model, length, 16) for length in (8, 28, 32)] == [16, 16, 15]


def test_each_slot_that_a_record_may_have_is_probed(shared: Make) -> None:
    model = with_limit(shared, 32)
    for filled in (3, 4):
        probes = list(example_probes(model, 16, 4, filled))
        assert sorted(place for _, places in probes for place in places) == list(range(filled))
        assert not any(bool(batch["attention_mask"].all()) for batch, _ in probes)


def test_a_gpu_has_larger_batches() -> None:
    assert feature_slots(torch.device("cpu")) < feature_slots(torch.device("cuda"))
