"""Regression: a text has a number, such as a rating or a similarity.

A model is trained on numbers between −1 and 1: those of a plan's range, moved and scaled; what lies beyond the range counts as
its nearer end. The range is public. A mean or a deviation that is computed from records would reveal something about them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotune.data.metrics.metrics import NumberMetrics, compute_number_metrics
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.text import Example, SequenceClassification
from cotune.data.types import Input, Label
from cotune.errors import ModelError

_LARGEST = torch.finfo(torch.float32).max  # what a prediction that is no number counts as
_NAMES = ("value",)


class Regression(SequenceClassification):
    """See `tasks.Task`. A label is a number; scores are (b, 1), in units of half the range from its middle.

    Args:
        low: What −1 stands for.
        high: What 1 stands for. A finished model gives numbers as people read them, for which −1 and 1 are themselves.
    """

    described = "regression model"
    problem_type: str | None = "regression"
    keeps_trained_head = False  # that of a finished model gives other units
    floor = "always the mean"
    label_dtype = torch.float32

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        self.low = low
        self.high = high
        self.middle = low + (high - low) / 2
        self.half = (high - low) / 2

    def suited(
        self, target_range: tuple[float, float] | None, labels: Sequence[str], max_target: int | None = None
    ) -> Regression:
        return self if target_range is None else Regression(*target_range)

    def head_names(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        return labels or _NAMES

    def fit(self, reader: Any, module: Any) -> None:
        super().fit(reader, module)
        _last_layer(module)

    @torch.no_grad()
    def finish(self, module: Any) -> None:
        """Writes the range into the last layer of the head."""
        layer = _last_layer(module)
        layer.weight.mul_(self.half)
        layer.bias.mul_(self.half).add_(self.middle)

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        text_column, label_column = file.wanted
        text = format_value(file, text_column, number, given)
        word = format_value(file, label_column, number, label).strip()
        if not text.strip():
            return "blank text"
        if not word:
            return "missing label"
        value = _number(word)
        if value is None:
            return "label that is no number"
        return (text, value) if is_unicode(text) else "broken Unicode"

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        return self.record(file, number, given, 0)

    def targets(self, held: Sequence[Label], classes: Sequence[str]) -> list[Any]:
        """The numbers as they were read."""
        return list(held)

    def is_unknown(self, label: Label, known: Collection[str]) -> bool:
        return False

    def encode_target(self, target: Any) -> float:
        inside = min(max(float(target), self.low), self.high)
        return (inside - self.middle) / self.half

    def label_pool(self, classes: int) -> Tensor:
        return torch.tensor([-1.0, 0.0, 1.0])

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        return super().examples(reader, max_length, inputs, [self.encode_target(target) for target in targets])

    def samples(self, reader: Any) -> list[Example]:
        return [{**example, "labels": float(example["labels"])} for example in super().samples(reader)]

    def blank(self, reader: Any, length: int) -> Example:
        return {**super().blank(reader, length), "labels": float(IGNORED)}

    def losses(self, module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
        return self.losses_from_scores(self.scores(module, batch), batch["labels"])

    def losses_from_scores(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Squared errors, in squares of half the range."""
        there = labels != IGNORED
        return (scores[:, 0] - labels * there).square() * there

    def are_right(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Those within a tenth of the range."""
        return ((scores[:, 0] - labels).abs() <= 0.2) | (labels == IGNORED)

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        return [(value,) for value in self.answers_from_scores(scores)]

    def answers_from_scores(self, scores: Tensor) -> list[Any]:
        """Numbers in the units of the records."""
        read = scores[:, 0].double().nan_to_num(nan=_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
        found: list[Any] = (self.middle + self.half * read).tolist()
        return found

    def metrics(self, truth: Sequence[Any], predicted: Sequence[Any], classes: int) -> NumberMetrics:
        return compute_number_metrics(truth, predicted)

    def read_metrics(self, values: Mapping[str, float]) -> NumberMetrics:
        return NumberMetrics(**values)

    def constant(self, held: Sequence[Label], classes: Sequence[str]) -> float:
        """The mean."""
        return math.fsum(float(value) for value in held if isinstance(value, float)) / max(1, len(held))


def _number(word: str) -> float | None:
    """A finite number that float32 has room for; None for anything else."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST else None


def _last_layer(module: Any) -> nn.Linear:
    """The layer that gives the number. Raises ModelError where there is none with a bias, which holds the middle of the range."""
    found = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.out_features == 1]
    if len(found) != 1 or found[0].bias is None:
        raise ModelError(
            f"the head of the architecture {module.config.model_type} has no last layer with one output and a bias, into which"
            " the range of the numbers is written: expected one such as bert, distilbert or roberta; use another base model",
            code="model.no_regression_head",
        )
    return found[0]
