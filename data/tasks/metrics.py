"""How good a model is on a test set, in the figures that the users of a task expect."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from cotune.errors import DataError


class Metrics(Protocol):
    """What the metrics of all tasks have in common."""

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right, in [0, 1]."""

    def as_dict(self) -> dict[str, float]:
        """Return the figures by their names."""


@dataclass(frozen=True)
class ClassMetrics:
    """Of classes, each in [0, 1]; precision, recall and F1 are means over the classes (macro).

    Of tags it is the words that are counted, "O" among the classes. A word that a model's length cuts off is one told wrong.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class MultiTaskMetrics:
    """Of several tasks: the means over them, and the figures of each.

    Attributes:
        tasks: Task -> its figures; those without a label in the test set are absent.
    """

    tasks: Mapping[str, ClassMetrics]

    @property
    def accuracy(self) -> float:
        return self._mean("accuracy")

    def as_dict(self) -> dict[str, float]:
        """Return the means by their names, and those of each task as "task/accuracy", "task/f1" and so on."""
        means = {key: self._mean(key) for key in ("accuracy", "precision", "recall", "f1")}
        return means | {f"{task}/{key}": value for task, own in self.tasks.items() for key, value in own.as_dict().items()}

    @classmethod
    def read(cls, values: Mapping[str, float]) -> MultiTaskMetrics:
        """Return metrics from their `as_dict`."""
        found: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            task, slash, key = name.partition("/")
            if slash:
                found.setdefault(task, {})[key] = value
        return cls({task: ClassMetrics(**own) for task, own in found.items()})

    def _mean(self, key: str) -> float:
        return sum(own.as_dict()[key] for own in self.tasks.values()) / max(1, len(self.tasks))


@dataclass(frozen=True)
class TextMetrics:
    """Of texts that a model is to write, over all target tokens of the test set, each predicted from the true ones before it.

    Attributes:
        loss: Mean negative log-likelihood, in nats per token: less is better.
        perplexity: e to the loss.
        accuracy: Share of the tokens that the model finds most probable.
    """

    loss: float
    perplexity: float
    accuracy: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def compute_metrics(truth: Sequence[int], predicted: Sequence[int], classes: int) -> ClassMetrics:
    """Metrics of predicted against true class numbers; a class that is never predicted has precision 0."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support  # its import takes a second

    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=list(range(classes)), average="macro", zero_division=0
    )
    return ClassMetrics(float(accuracy_score(truth, predicted)), float(precision), float(recall), float(f1))


def majority_metrics(train: Sequence[int], truth: Sequence[int], classes: int) -> ClassMetrics:
    """What always answering the most frequent class of the training data reaches."""
    most = max(range(classes), key=lambda c: (list(train).count(c), -c))
    return compute_metrics(truth, [most] * len(truth), classes)


TextAnswer = tuple[float, int, int]  # of a record: the sum of its losses in nats, its target tokens, how many of them are told


def compute_text_metrics(answers: Sequence[TextAnswer]) -> TextMetrics:
    """Metrics of what a model makes of the targets of records.

    Raises:
        DataError: Where no record has a target that the model reads.
    """
    tokens = sum(count for _, count, _ in answers)
    if not tokens:
        raise DataError(
            "no test record has a target within the length that the model reads: raise model.max_length, or shorten the prompts",
            code="data.no_targets",
        )
    loss = math.fsum(loss for loss, _, _ in answers) / tokens
    return TextMetrics(loss, _exp(loss), sum(right for _, _, right in answers) / tokens)


def _exp(loss: float) -> float:
    """The largest float where there is no larger one: a document holds no infinity."""
    return math.exp(min(loss, math.log(sys.float_info.max)))
