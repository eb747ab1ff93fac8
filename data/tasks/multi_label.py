"""Multi-label classification: a text has any number of labels, or none. Each label is a yes or no of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.data.class_names import class_name
from cotune.data.metrics.metrics import LabelSetMetrics, compute_label_set_metrics
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.text import Example, SequenceClassification
from cotune.data.types import Input, Label, class_names_in


class MultiLabelClassification(SequenceClassification):
    """See `tasks.Task`. A target is 1 or 0 for each label, and an answer the probability of each.

    Args:
        labels: How many there are.
    """

    described = "multi-label classifier"
    problem_type: str | None = "multi_label_classification"
    floor = "each label as often as in the records"
    label_dtype = torch.float32

    def __init__(self, labels: int = 2) -> None:
        self.labels = labels

    def suited(
        self, target_range: tuple[float, float] | None, labels: Sequence[str], max_target: int | None = None
    ) -> MultiLabelClassification:
        return MultiLabelClassification(len(labels))

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        text_column, label_column = file.wanted
        text = format_value(file, text_column, number, given)
        names = _names(file, label_column, number, label)
        if not text.strip():
            return "blank text"
        return (text, names) if all(map(is_unicode, (text, *names))) else "broken Unicode"

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        return self.record(file, number, given, "")

    def targets(self, held: Sequence[Label], classes: Sequence[str]) -> list[Any]:
        known = set(classes)
        nothing = (IGNORED,) * len(classes)
        sets = (frozenset(class_names_in(label)) for label in held)
        return [tuple(int(name in own) for name in classes) if own <= known else nothing for own in sets]

    def is_unknown(self, label: Label, known: Collection[str]) -> bool:
        return not set(class_names_in(label)) <= set(known)

    def encode_target(self, target: Any) -> tuple[float, ...]:
        return tuple(map(float, target))

    def missing_target(self, given: Any) -> tuple[int, ...]:
        return (0,) * self.labels

    def label_pool(self, classes: int) -> Tensor:
        return torch.eye(classes)

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        return super().examples(reader, max_length, inputs, [self.encode_target(target) for target in targets])

    def samples(self, reader: Any) -> list[Example]:
        rows = enumerate(super().samples(reader))
        return [{**example, "labels": tuple(float(k % 2 == i % 2) for i in range(self.labels))} for k, example in rows]

    def blank(self, reader: Any, length: int) -> Example:
        return {**super().blank(reader, length), "labels": (float(IGNORED),) * self.labels}

    def losses(self, module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
        return self.losses_from_scores(self.scores(module, batch), batch["labels"], weights)

    def losses_from_scores(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Binary cross-entropies, the mean over the labels."""
        there = labels != IGNORED
        each = functional.binary_cross_entropy_with_logits(scores, labels * there, weights, reduction="none")
        return (each * there).mean(dim=1)

    def are_right(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Those of which every label is predicted correctly."""
        return (((scores > 0) == (labels > 0.5)) | (labels == IGNORED)).all(dim=1)

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in torch.sigmoid(scores.double()).tolist()]

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        unread = torch.full_like(scores[:1], torch.nan)
        return [unread if IGNORED in e["labels"] else scores[i : i + 1] for i, e in enumerate(examples)]

    def answers_from_scores(self, scores: Tensor) -> list[Any]:
        """A record that was not read has no label."""
        found: list[Any] = torch.sigmoid(scores.double()).nan_to_num(nan=0.0).flatten().tolist()
        return found

    def metrics(self, truth: Sequence[Any], predicted: Sequence[Any], classes: int) -> LabelSetMetrics:
        return compute_label_set_metrics(truth, predicted, classes)

    def read_metrics(self, values: Mapping[str, float]) -> LabelSetMetrics:
        return LabelSetMetrics(**values)

    def constant(self, held: Sequence[Label], classes: Sequence[str]) -> tuple[float, ...]:
        """The share of the records that have each label."""
        counts = Counter(name for label in held for name in class_names_in(label))
        return tuple(counts[name] / max(1, len(held)) for name in classes)


def _names(file: DataFile, column: str, number: int, value: object) -> tuple[str, ...]:
    """The labels of a record, each once, in alphabetical order: of a list, or of a text with separators."""
    parts = list(value) if isinstance(value, list | tuple) else _parts(file, column, number, value)
    names = (class_name(format_value(file, column, number, part)) for part in parts)
    return tuple(sorted({name for name in names if name}))


def _parts(file: DataFile, column: str, number: int, value: object) -> list[object]:
    return list(format_value(file, column, number, value).split(file.config.label_separator))
