"""One person, many records. DP-SGD clipped each row by itself, and a person with k rows moved a step by k clip norms.

What the README called ε = 3 was, for a person with k records, 7.1 (k = 2), 24.5 (k = 5) and 69.7 (k = 10). Now the sum of a
person's gradients is clipped, and however many records there are, the person's contribution is one clip norm at most.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cotune.data.dataset import Dataset
from cotune.data.records import Records
from cotune.privacy.config import RecordPrivacy
from tests.support.movement import movement

CLIP = 0.5
OTHERS = [("others", f"other text {i}", "x" if i % 2 else "y") for i in range(12)]
Row = tuple[str, str, str]  # whose, text, label


def held(rows: list[Row], privacy: RecordPrivacy, seed: int = 7) -> Dataset:
    whose, texts, labels = zip(*rows, strict=True)
    return Dataset(((Records(texts, labels, "records", units=whose), np.arange(len(rows))),), ("x", "y")).bound_contributions(
        privacy, seed
    )


def sum_of(rows: list[Row], privacy: RecordPrivacy) -> Tensor:
    """Texts of the attacked person all look the same to the model: their gradients add up without canceling."""
    dataset = held(rows, privacy)
    features = torch.tensor([[0.0, 9.0] if text.startswith("own") else [9.0, 0.0] for text in map(str, dataset.inputs())])
    return movement(features, dataset.targets, dataset.units, CLIP)


@pytest.mark.parametrize("records", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("most", [1, 5, 50])
def test_a_person_adds_at_most_one_clip_norm(records: int, most: int) -> None:
    privacy = RecordPrivacy(unit="patient_id", max_records=most)
    own = [("victim", f"own text {i}", "x") for i in range(records)]
    added = sum_of([*own, *OTHERS], privacy) - sum_of(OTHERS, privacy)
    assert 0.9 * CLIP < float(added.norm()) <= CLIP * (1 + 1e-3)  # the grid rounds a little


def test_rows_that_are_promised_to_one_by_one_add_up() -> None:
    """What the promise to each record does not cover, and docs/units.md says so."""
    own = [("victim", f"own text {i}", "x") for i in range(10)]
    added = sum_of([*own, *OTHERS], RecordPrivacy()) - sum_of(OTHERS, RecordPrivacy())
    assert float(added.norm()) > 9 * CLIP


@pytest.mark.parametrize("copies", [1, 2, 10])
def test_copies_of_a_text_are_one_record(copies: int) -> None:
    """They were trained on k times and charged once."""
    own = [("victim", "own text", "x")] * copies
    added = sum_of([*own, *OTHERS], RecordPrivacy()) - sum_of(OTHERS, RecordPrivacy())
    assert float(added.norm()) <= CLIP * (1 + 1e-3)


def test_the_number_of_people_is_what_counts() -> None:
    privacy = RecordPrivacy(unit="patient_id", max_records=3)
    rows = [(f"patient {i}", f"text {i} {j}", "x") for i in range(20) for j in range(i + 1)]
    dataset = held(rows, privacy)
    assert len(dataset.units) == 20
    assert len(dataset) == 1 + 2 + 3 * 18
    assert sum(dataset.weights) == pytest.approx(20)
    assert sum(dataset.label_counts().values()) == pytest.approx(20)
