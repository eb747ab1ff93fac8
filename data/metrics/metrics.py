"""How good a model is on a test set, in the figures that the users of a task expect."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from cotune.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Metrics(Protocol):
    """What the metrics of all tasks have in common."""

    @property
    def score(self) -> float:
        """The figure by which two states of a model are compared, in [0, 1]; more is better."""

    def as_dict(self) -> dict[str, float]:
        """Return the figures by their names."""


@dataclass(frozen=True)
class _Figures:
    """Metrics whose fields are their figures."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class ClassMetrics(_Figures):
    """Of classes, each in [0, 1]; precision, recall and F1 are means over the classes (macro).

    Of tags, words are counted, with "O" among the classes. A word beyond the length that the model reads counts as wrong.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float

    @property
    def score(self) -> float:
        return self.accuracy


@dataclass(frozen=True)
class MultiTaskMetrics:
    """Of several tasks: the means over them, and the figures of each.

    Attributes:
        tasks: Task -> its figures; those without a label in the test set are absent.
    """

    tasks: Mapping[str, ClassMetrics]

    @property
    def score(self) -> float:
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
class TextMetrics(_Figures):
    """Of texts that a model is to write, over all target tokens of the test set, each predicted from the true ones before it.

    Attributes:
        loss: Mean negative log-likelihood, in nats per token: less is better; the largest float where it is no number.
        perplexity: e to the loss.
        accuracy: Share of the tokens that the model finds most probable.
    """

    loss: float
    perplexity: float
    accuracy: float

    @property
    def score(self) -> float:
        return self.accuracy


@dataclass(frozen=True)
class NumberMetrics(_Figures):
    """Of numbers, in the units of the records.

    Attributes:
        mse: Mean squared error: less is better.
        mae: Mean absolute error.
        spearman: Rank correlation of truth and prediction, in [-1, 1]; 0 where one of both is all the same.
        r2: 1 − squared errors / squared distances of the truth from its mean; 0 where the truth is all the same.
    """

    mse: float
    mae: float
    spearman: float
    r2: float

    @property
    def score(self) -> float:
        """The share of the variance that is explained."""
        return max(0.0, self.r2)


@dataclass(frozen=True)
class LabelSetMetrics(_Figures):
    """Of sets of labels, each in [0, 1]; a label is predicted where its probability is above a half.

    Attributes:
        micro_f1: F1 over all labels of all records.
        macro_f1: Mean over the labels of the F1 of each.
        mean_average_precision: Mean over the labels that some record has of average precision, which reads the order of the
            probabilities alone.
        exact: Share of the records of which every label is predicted correctly.
    """

    micro_f1: float
    macro_f1: float
    mean_average_precision: float
    exact: float

    @property
    def score(self) -> float:
        return self.micro_f1


def compute_number_metrics(truth: Sequence[float], predicted: Sequence[float]) -> NumberMetrics:
    """Metrics of predicted against true numbers."""
    import numpy as np
    from scipy.stats import rankdata

    true = np.asarray(truth, dtype=np.float64)
    given = np.asarray(predicted, dtype=np.float64)
    errors = given - true
    around = np.square(true - true.mean()).sum()
    ranks = np.stack([rankdata(true), rankdata(given)])
    apart = ranks - ranks.mean(axis=1, keepdims=True)
    size = math.sqrt(float(np.prod(np.square(apart).sum(axis=1))))
    return NumberMetrics(
        mse=float(np.square(errors).mean()),
        mae=float(np.abs(errors).mean()),
        spearman=float((apart[0] * apart[1]).sum()) / size if size else 0.0,
        r2=1 - float(np.square(errors).sum() / around) if around else 0.0,
    )


def compute_label_set_metrics(truth: Sequence[int], probabilities: Sequence[float], labels: int) -> LabelSetMetrics:
    """Metrics of probabilities against what is true.

    Args:
        truth: 1 or 0 for each label of each record, record after record.
        probabilities: As many.
        labels: How many there are.
    """
    import numpy as np
    from sklearn.metrics import average_precision_score, f1_score  # its import takes a second

    true = np.asarray(truth, dtype=np.int64).reshape(-1, labels)
    given = np.asarray(probabilities, dtype=np.float64).reshape(-1, labels)
    predicted = (given > 0.5).astype(np.int64)
    each = [average_precision_score(true[:, i], given[:, i]) for i in range(labels) if true[:, i].any()]
    return LabelSetMetrics(
        micro_f1=float(f1_score(true.ravel(), predicted.ravel(), zero_division=0)),
        macro_f1=float(np.mean([f1_score(true[:, i], predicted[:, i], zero_division=0) for i in range(labels)])),
        mean_average_precision=float(np.mean(each)) if each else 0.0,
        exact=float((true == predicted).all(axis=1).mean()),
    )


def compute_metrics(truth: Sequence[int], predicted: Sequence[int], classes: int) -> ClassMetrics:
    """Return accuracy, macro F1, and precision, recall and F1 of each class; a class that is never predicted has precision 0.

    Args:
        truth: True class numbers, from 0.
        predicted: As many predicted ones.
        classes: Number of classes.
    """
    import numpy as np

    true = np.asarray(truth, dtype=np.int64)
    given = np.asarray(predicted, dtype=np.int64)
    is_right = true == given
    right = _count_classes(true[is_right], classes)
    each_true = _count_classes(true, classes)
    each_predicted = _count_classes(given, classes)
    precision = right / np.maximum(each_predicted, 1)
    recall = right / np.maximum(each_true, 1)
    f1 = 2 * right / np.maximum(each_true + each_predicted, 1)
    return ClassMetrics(float(is_right.mean()), float(precision.mean()), float(recall.mean()), float(f1.mean()))


def _count_classes(numbers: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """How many of some class numbers are each class, (classes,); other numbers are none of them."""
    import numpy as np

    return np.bincount(numbers[(numbers >= 0) & (numbers < classes)], minlength=classes)


def majority_metrics(train: Sequence[int], truth: Sequence[int], classes: int) -> ClassMetrics:
    """Return the metrics of always answering the most frequent class of the training data.

    Args:
        train: Class numbers of the training data; of equally frequent classes the first is taken.
        truth: True class numbers of the test set.
        classes: Number of classes.
    """
    most = max(range(classes), key=lambda c: (list(train).count(c), -c))
    return compute_metrics(truth, [most] * len(truth), classes)


# Of a record: the sum of its losses in nats, its number of target tokens, how many of them are predicted correctly.
TextAnswer = tuple[float, int, int]


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
    loss = loss if math.isfinite(loss) else sys.float_info.max  # of a model that overflows: a document holds no infinity
    return TextMetrics(loss, _exp(loss), sum(right for _, _, right in answers) / tokens)


def _exp(loss: float) -> float:
    """The largest float where there is no larger one."""
    return math.exp(min(loss, math.log(sys.float_info.max)))
