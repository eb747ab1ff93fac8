"""Evaluate answers by sums over records: squared errors, or counts of labels that are true, predicted, and both.

The main metric is a function of such sums, so that its intervals and comparisons are computed by a bootstrap over the units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.data.metrics.metrics import Metrics
from cotune.models.evaluation.intervals import Numbers, Paired, bootstrapped, percentiles, resampled

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judgment:
    """How a task's answers are evaluated.

    Attributes:
        key: Name of the main metric.
        columns: (truth, predicted) -> the terms of k sums, (answers, k).
        figure: Sums (..., k) -> main metric (...).
        less_is_better: Whether smaller values are better.
    """

    key: str
    columns: Callable[[Floats, Floats], Floats]
    figure: Callable[[Floats], Floats]
    less_is_better: bool = False


def _errors(truth: Floats, predicted: Floats) -> Floats:
    return np.stack([np.square(predicted - truth), np.ones(len(truth))], axis=1)


def _labels(truth: Floats, predicted: Floats) -> Floats:
    there = truth > 0.5
    given = predicted > 0.5
    return np.stack([there & given, there, given], axis=1).astype(np.float64)


def _token_f1(truth: Floats, predicted: Floats) -> Floats:
    """Of predicted (answers, 2): F1 of each, and whether it is exact."""
    return np.stack([predicted[:, 0], np.ones(len(truth))], axis=1)


def _mean(sums: Floats) -> Floats:
    found: Floats = sums[..., 0] / sums[..., 1]
    return found


def _f1(sums: Floats) -> Floats:
    there = sums[..., 1] + sums[..., 2]
    return np.divide(2 * sums[..., 0], there, out=np.zeros_like(there), where=there > 0)


JUDGMENTS = {
    "regression": Judgment("mse", _errors, _mean, less_is_better=True),
    "question-answering": Judgment("token_f1", _token_f1, _mean),
    "multi-label": Judgment("micro_f1", _labels, _f1),
}


@dataclass(frozen=True)
class SummedAnswers:
    """What a model predicts.

    Attributes:
        judgment: Of the task.
        metrics: All figures of these answers.
        sums: (answers, k) of `Judgment.columns`.
        units: (answers,) the number of the unit that each belongs to.
    """

    judgment: Judgment
    metrics: Metrics
    sums: Floats
    units: Numbers

    @property
    def score(self) -> float:
        """The figure that decides; more is better."""
        found = float(self.judgment.figure(self.sums.sum(axis=0)))
        return -found if self.judgment.less_is_better else found

    def figures(self) -> dict[str, Any]:
        """Return the metrics, with the interval of the one that decides."""
        drawn = self.judgment.figure(resampled(self.units, self.sums))
        return {**self.metrics.as_dict(), f"{self.judgment.key}_interval": list(percentiles(drawn))}

    def compare(self, theirs: SummedAnswers) -> Paired:
        """Compare with another model on the same records, by a paired bootstrap over the units."""
        ours, others = np.split(resampled(self.units, np.concatenate([self.sums, theirs.sums], axis=1)), 2, axis=1)
        apart = self.judgment.figure(ours) - self.judgment.figure(others)
        return bootstrapped(self.score - theirs.score, -apart if self.judgment.less_is_better else apart)


def judge_answers(task: str, metrics: Metrics, truth: Sequence[Any], predicted: Sequence[Any], units: Numbers) -> SummedAnswers:
    """Return the answers of a task in `JUDGMENTS`.

    Args:
        task: Its name.
        metrics: Of the answers.
        truth: True targets.
        predicted: Predictions, in the same order.
        units: Number of the unit of each.
    """
    judgment = JUDGMENTS[task]
    sums = judgment.columns(np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64))
    return SummedAnswers(judgment, metrics, sums, units)
