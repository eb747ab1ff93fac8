"""Confidence intervals of metrics on held-out records, and tests of whether two models differ on the same records.

Records of one unit (of a patient, the words of a sentence) are dependent, so units are resampled or counted. If every unit has
exactly one answer, tests and intervals are exact; else they are bootstrapped over the units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.data.metrics.metrics import TextMetrics, compute_metrics, compute_text_metrics

CONFIDENCE = 0.95
MIN_TEST_RECORDS = 200  # test records, below which a report warns
_DRAWS = 2000  # of a bootstrap
_CHUNK = 2**22  # numbers in memory at a time
_SEED = 5  # of the resampling: the same answers give the same interval

Interval = tuple[float, float]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What a model predicted on some records.

    Attributes:
        truth: (n,) class numbers.
        predicted: (n,) class numbers.
        units: (n,) the number of the unit that each answer belongs to.
        classes: How many classes there are.
    """

    truth: Numbers
    predicted: Numbers
    units: Numbers
    classes: int

    @property
    def single(self) -> bool:
        """Whether every answer belongs to a different unit."""
        return len(np.unique(self.units)) == len(self.units)

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,) which answers are right."""
        right: NDArray[np.bool_] = self.truth == self.predicted
        return right

    @property
    def score(self) -> float:
        """The accuracy: more is better."""
        return float(self.right.mean())

    def figures(self) -> dict[str, Any]:
        """Return the metrics, with the intervals of accuracy and F1."""
        found = compute_metrics(self.truth.tolist(), self.predicted.tolist(), self.classes).as_dict()
        return {**found, "accuracy_interval": list(accuracy_interval(self)), "f1_interval": list(f1_interval(self))}

    def compare(self, theirs: Answers) -> Paired:
        """Compare with what another model predicted on the same records (see `compare_paired`)."""
        return compare_paired(self, theirs)


@dataclass(frozen=True)
class TextAnswers:
    """A language model's losses on target texts.

    Attributes:
        losses: (n,) sum of the losses of each record's target tokens, in nats.
        tokens: (n,) number of each record's target tokens.
        right: (n,) number of them that the model finds most probable.
        units: (n,) number of each record's unit.
    """

    losses: NDArray[np.float64]
    tokens: Numbers
    right: Numbers
    units: Numbers

    @property
    def score(self) -> float:
        """The loss per token with its sign changed: more is better."""
        return -self._metrics().loss

    def figures(self) -> dict[str, Any]:
        """Return the metrics, with the intervals of loss and accuracy: percentiles of a bootstrap over the units."""
        sums = resampled(self.units, np.stack([self.losses, self.right, self.tokens], axis=1))
        sums = sums[sums[:, 2] > 0]  # a draw of records without any target says nothing
        return {
            **self._metrics().as_dict(),
            "loss_interval": list(percentiles(sums[:, 0] / sums[:, 2])),
            "accuracy_interval": list(percentiles(sums[:, 1] / sums[:, 2])),
        }

    def compare(self, theirs: TextAnswers) -> Paired:
        """Compare with another model on the same records, by a paired bootstrap over the units of the loss per token."""
        saved = theirs.losses - self.losses
        sums = resampled(self.units, np.stack([saved, self.tokens], axis=1))
        sums = sums[sums[:, 1] > 0]
        return bootstrapped(float(saved.sum() / self.tokens.sum()), sums[:, 0] / sums[:, 1])

    def _metrics(self) -> TextMetrics:
        return compute_text_metrics(list(zip(self.losses.tolist(), self.tokens.tolist(), self.right.tolist(), strict=True)))


@dataclass(frozen=True)
class Paired:
    """Two models on the same records: by how much ours is better.

    Attributes:
        difference: By how much the figure that decides is better: accuracy; of texts, loss in nats per token.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Of the two-sided test that there is no difference.
        test: Its name.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str

    @property
    def answer(self) -> str:
        """ "yes" where ours is better, "no" where theirs is, else "too close to tell"."""
        if self.p >= 1 - CONFIDENCE:
            return "too close to tell"
        return "yes" if self.difference > 0 else "no"

    def figures(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "difference": self.difference,
            "interval": [self.low, self.high],
            "p": self.p,
            "test": self.test,
            "better": self.answer,
        }


def wilson_interval(right: int, total: int) -> Interval:
    """Return the score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927).

    >>> [round(end, 4) for end in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    from scipy.stats import binomtest

    found = binomtest(right, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def accuracy_interval(answers: Answers) -> Interval:
    """Return Wilson's interval; of units with several answers, the percentiles of a bootstrap over the units."""
    if answers.single:
        return wilson_interval(int(answers.right.sum()), len(answers.truth))
    sums = resampled(answers.units, np.stack([answers.right, np.ones(len(answers.truth))], axis=1))
    return percentiles(sums[:, 0] / sums[:, 1])


def f1_interval(answers: Answers) -> Interval:
    """Return the percentiles of macro F1 over a bootstrap of the units (Efron & Tibshirani, 1993, chapter 13).

    A class that neither is there nor is predicted in a draw has F1 0, as in `data.tasks.metrics.compute_metrics`.
    """
    classes = np.arange(answers.classes)
    there = answers.truth[:, None] == classes
    predicted = answers.predicted[:, None] == classes
    sums = resampled(answers.units, np.concatenate([there & predicted, there, predicted], axis=1))
    right, true, given = np.split(sums, 3, axis=1)
    f1 = np.divide(2 * right, true + given, out=np.zeros_like(right), where=true + given > 0)
    return percentiles(f1.mean(axis=1))


def compare_paired(ours: Answers, theirs: Answers) -> Paired:
    """Compare two models on the same records, in the same order.

    Where every unit is one answer: McNemar's exact test (Psychometrika 12, 1947), the two-sided binomial test on the records that
    exactly one of both tells rightly, and the interval that belongs to it (Clopper & Pearson, 1934). Else a paired bootstrap over
    the units.
    """
    apart = ours.right.astype(np.int64) - theirs.right.astype(np.int64)
    if ours.single:
        return _mcnemar(int((apart > 0).sum()), int((apart < 0).sum()), len(apart))
    sums = resampled(ours.units, np.stack([apart, np.ones(len(apart))], axis=1))
    return bootstrapped(float(apart.mean()), sums[:, 0] / sums[:, 1])


def bootstrapped(difference: float, drawn: NDArray[np.float64]) -> Paired:
    """Return the comparison of which a bootstrap has drawn the difference many times."""
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1
    return Paired(difference, *percentiles(drawn), min(1.0, 2 * float(tail) / (len(drawn) + 1)), "paired bootstrap")


def _mcnemar(better: int, worse: int, total: int) -> Paired:
    from scipy.stats import binomtest

    decided = better + worse
    difference = (better - worse) / total
    if not decided:
        return Paired(0.0, 0.0, 0.0, 1.0, "McNemar exact")
    found = binomtest(better, decided)
    ends = found.proportion_ci(CONFIDENCE, method="exact")
    low, high = ((2 * float(end) - 1) * decided / total for end in (ends.low, ends.high))
    return Paired(difference, low, high, float(found.pvalue), "McNemar exact")


def resampled(units: Numbers, columns: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return sums of columns (answers, k) over resampled units: (draws, k)."""
    _, place = np.unique(units, return_inverse=True)
    count = int(place.max()) + 1
    each = np.zeros((count, columns.shape[1]))
    np.add.at(each, place, columns.astype(np.float64))
    kinds, often = np.unique(each, axis=0, return_counts=True)  # units that are alike are drawn together
    rng = np.random.default_rng(_SEED)
    step = max(1, _CHUNK // len(kinds))
    drawn = (rng.multinomial(count, often / count, size=min(step, _DRAWS - start)) for start in range(0, _DRAWS, step))
    return np.concatenate([each_draw.astype(np.float64) @ kinds for each_draw in drawn])


def percentiles(values: NDArray[np.float64]) -> Interval:
    """Return the ends between which 95 % of the values are."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def build_answers(truth: Sequence[int], predicted: Sequence[int], units: Sequence[int], classes: int) -> Answers:
    """Return answers from plain lists.

    Args:
        truth: True class numbers.
        predicted: Predicted class numbers, in the same order.
        units: Number of the unit of each.
        classes: Number of classes.
    """
    return Answers(
        truth=np.asarray(truth, dtype=np.int64),
        predicted=np.asarray(predicted, dtype=np.int64),
        units=np.asarray(units, dtype=np.int64),
        classes=classes,
    )
