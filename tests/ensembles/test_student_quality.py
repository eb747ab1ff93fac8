"""What distilling has cost, by hand: a student of known answers beside a teacher of known answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from cotune.data.config import TaskName
from cotune.data.types import Input
from cotune.ensembles.calibration import Floats, Numbers
from cotune.ensembles.student_quality import measure_student
from cotune.ensembles.student_training import Lessons
from cotune.models.evaluation.intervals import wilson_interval


@dataclass(frozen=True)
class Says:
    """A model whose answers are given."""

    answers: Sequence[Floats]
    labels: tuple[str, ...] = ("a", "b")
    task: TaskName = "sequence-classification"
    max_length: int = 8
    content_hash: str = ""

    def probabilities(self, inputs: Sequence[Input]) -> list[Tensor]:
        return [torch.from_numpy(each) for each in self.answers]


def sure_of(numbers: Sequence[int], sure: float = 0.75) -> list[Floats]:
    """One answer for each input, of two classes."""
    return [np.eye(2)[[number]] * (2 * sure - 1) + (1 - sure) for number in numbers]


def one_each(numbers: Sequence[int]) -> list[Numbers]:
    return [np.array([number], dtype=np.int64) for number in numbers]


def test_cost_is_agreement_divergence_and_difference() -> None:
    lessons = Lessons(["x"] * 5, sure_of([0, 0, 1, 1, 1]), one_each([0, 0, 1, 0, 1]))
    found = measure_student(Says(sure_of([0, 1, 1, 1, 0])), lessons)
    assert found["answers"] == 5
    assert found["agreement"] == pytest.approx(3 / 5)
    assert found["agreement_interval"] == pytest.approx(list(wilson_interval(3, 5)))
    assert found["kl"] == pytest.approx(2 / 5 * (0.75 - 0.25) * np.log(3))
    assert (found["teacher_accuracy"], found["student_accuracy"]) == (4 / 5, 2 / 5)
    assert found["accuracy_difference"] == pytest.approx(-2 / 5)
    low, high = found["difference_interval"]
    assert low <= -2 / 5 <= high
    assert high > 0  # two answers of five prove nothing


def test_a_perfect_student_costs_nothing() -> None:
    taught = sure_of([0, 1, 1, 0] * 10)
    found = measure_student(Says(taught), Lessons(["x"] * 40, taught, one_each([0, 1, 0, 1] * 10)))
    assert (found["agreement"], found["accuracy_difference"], found["difference_interval"]) == (1.0, 0.0, [0.0, 0.0])
    assert found["kl"] == pytest.approx(0.0, abs=1e-12)


def test_what_either_cannot_read_does_not_count() -> None:
    unread = [np.full((1, 2), np.nan)]
    lessons = Lessons(["x"] * 3, [*unread, *sure_of([0, 1])], one_each([0, 0, 0]))
    found = measure_student(Says([*sure_of([0, 0]), *unread]), lessons)
    assert (found["answers"], found["agreement"], found["teacher_accuracy"]) == (1, 1.0, 1.0)


def test_without_answers_there_are_no_figures() -> None:
    unread = [np.full((1, 2), np.nan)]
    found = measure_student(Says(unread), Lessons(["x"], unread, one_each([0])))
    assert found.pop("answers") == 0
    assert set(found.values()) == {None}


def test_words_of_one_text_are_not_independent() -> None:
    """All words of a text agree or none does: the interval is that of texts, and so wider than that of words."""
    agree = [1, 0] * 20
    taught = [np.repeat(sure_of([0])[0], 30, axis=0) for _ in agree]
    said = [np.repeat(sure_of([1 - each])[0], 30, axis=0) for each in agree]
    found = measure_student(Says(said, task="token-classification"), Lessons([("w",) * 30] * 40, taught))
    low, high = found["agreement_interval"]
    wide_low, wide_high = wilson_interval(600, 1200)
    assert found["agreement"] == 0.5
    assert high - low > 3 * (wide_high - wide_low)
    assert found["accuracy_difference"] is None
