"""Targets that are classes: of a record, or of each word of one. Their scores and losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.data.config import DataConfig
from cotune.data.metrics.metrics import ClassMetrics, Metrics, compute_metrics
from cotune.data.types import Label, class_names_in

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a position that has none; of a whole row that contributes nothing


class ClassTargets:
    """What tasks have in common whose records have classes: see `tasks.Task`."""

    key = "text"
    keeps_head = False
    keeps_trained_head = True
    floor = "always the most frequent class"
    label_dtype = torch.long
    has_several_heads = False

    def columns(self, config: DataConfig) -> tuple[str, str]:
        return self.key, "label"

    def suited(self, target_range: tuple[float, float] | None, labels: Sequence[str], max_target: int | None = None) -> Self:
        return self

    def head_names(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        return labels

    def finish(self, module: Any) -> None:
        """The scores of classes are used as they are."""

    def targets(self, held: Sequence[Label], classes: Sequence[str]) -> list[Any]:
        number = {name: i for i, name in enumerate(classes)}
        return [
            number.get(label, IGNORED)
            if isinstance(label, str)
            else tuple(number.get(tag, IGNORED) for tag in class_names_in(label))
            for label in held
        ]

    def is_unknown(self, label: Label, known: Collection[str]) -> bool:
        return isinstance(label, str) and label not in known

    def encode_target(self, target: Any) -> Any:
        return target

    def missing_target(self, given: Any) -> Any:
        return 0

    def label_pool(self, classes: int) -> Tensor:
        return torch.arange(classes)

    def lost(self, reader: Any, max_length: int, inputs: Sequence[Any]) -> int:
        return 0

    def refused(self, reader: Any, inputs: Sequence[Any]) -> int:
        return 0

    def losses(self, module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
        return example_losses(module, batch, weights)

    def losses_from_scores(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        return losses_from_scores(scores, labels, weights)

    def answers_from_scores(self, scores: Tensor) -> list[Any]:
        found: list[Any] = classes_from_scores(scores).tolist()
        return found

    def scores(self, module: nn.Module, batch: Batch) -> Tensor:
        return logits(module, batch)

    def are_right(self, scores: Tensor, labels: Tensor) -> Tensor:
        return all_correct(scores, labels)

    def metrics(self, truth: Sequence[Any], predicted: Sequence[Any], classes: int) -> Metrics:
        return compute_metrics(truth, predicted, classes)

    def read_metrics(self, values: Mapping[str, float]) -> Metrics:
        return ClassMetrics(**values)

    def constant(self, held: Sequence[Label], classes: Sequence[str]) -> Any:
        """The class number that most of the labels (with tags: of the words) have; of equally many the first."""
        counts = Counter(name for label in held for name in class_names_in(label))
        return max(range(len(classes)), key=lambda number: (counts[classes[number]], -number))


def logits(module: nn.Module, batch: Batch) -> Tensor:
    """The model's scores in float32: (b, classes), or (b, l, classes) where every position has its own."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return cast(Tensor, module(**inputs).logits).float()


def example_losses(module: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
    """The loss of each example by itself: (b,). Exactly 0 for one whose every label is IGNORED.

    Cross-entropy; of an example with a label for each position, the mean over its own labeled positions. A mean over the batch's
    would let one record change the gradient of another, which clipping could not bound.

    Args:
        module: The model.
        batch: Examples with their labels.
        weights: (classes,) how much a label of each class counts; None: all the same. Nothing is divided by their sum over the
            batch, for the same reason.
    """
    return losses_from_scores(logits(module, batch), batch["labels"], weights)


def losses_from_scores(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The losses of `example_losses` from scores (b, classes) and labels (b,), or (b, l, classes) and (b, l)."""
    losses = functional.cross_entropy(scores.movedim(-1, 1), labels, weights, ignore_index=IGNORED, reduction="none")
    return losses if labels.dim() == 1 else mean_over_labels(losses, labels)


def count_labels(labels: Any) -> int:
    """Return the number of labels of a row where each token may have one; 0 where a row has one label.

    Rows of about as many labels, side by side in batches, cost a language model the fewest scores (see
    `data.tasks.token_losses`). The number depends on the row alone, and so does the order of the rows of a unit.

    Args:
        labels: Of an encoded record.
    """
    return sum(label != IGNORED for label in labels) if isinstance(labels, list) else 0


def mean_over_labels(losses: Tensor, labels: Tensor) -> Tensor:
    """Return (b,) means of losses (b, l) over the positions of each row that have a label; 0 for a row without one."""
    return losses.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)


def classes_from_scores(scores: Tensor) -> Tensor:
    """Return the class numbers (n,) that scores (n, classes) mean; -1, which is right for none, where a record was not read."""
    return torch.where(scores.isnan().any(dim=1), -1, scores.argmax(dim=1))


def all_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Return (b,) which slots are classified rightly: with a label for each position, all of them. IGNORED ones always are."""
    right = (scores.argmax(dim=-1) == labels) | (labels == IGNORED)
    return right.reshape(len(right), -1).all(dim=1)
