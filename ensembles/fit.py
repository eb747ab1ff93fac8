"""Fit a fusion of predictions on labeled records, and compare it with each single model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cotune.data.records import Records
from cotune.ensembles.calibration import Floats, Numbers
from cotune.ensembles.folder import write_fused
from cotune.ensembles.fusion import PredictionFusion, assign_folds, cross_fitted, fit_fusion
from cotune.ensembles.predictor import aligned_probabilities, check_same_kind
from cotune.errors import DataError
from cotune.models.config import Method
from cotune.models.evaluation.intervals import Answers, compare_paired
from cotune.models.evaluation.predictor import Predictor, class_numbers, unit_numbers
from cotune.models.evaluation.quality import predict_classes, quality

FOLDS = 5
_FIGURES = ("accuracy", "accuracy_interval", "auroc", "macro", "calibration")


@dataclass(frozen=True)
class Judgment:
    """What several models say of the same labeled records.

    Attributes:
        labels: Class names, in the order of all probabilities.
        probabilities: (n, classes) of each model.
        truth: (n,) class numbers.
        units: (n,) the number of the unit that each answer belongs to.
    """

    labels: tuple[str, ...]
    probabilities: tuple[Floats, ...]
    truth: Numbers
    units: Numbers

    def folds(self, seed: int) -> Numbers:
        """(n,) folds for cross-fitting; all answers of a unit are in one fold."""
        _, first, place = np.unique(self.units, return_index=True, return_inverse=True)
        fold: Numbers = assign_folds(self.truth[first], FOLDS, seed)[place]
        return fold

    def answers(self, probabilities: Floats) -> Answers:
        """The answers that probabilities mean."""
        return Answers(self.truth, predict_classes(probabilities, self.labels), self.units, len(self.labels))

    def figures(self, probabilities: Floats) -> dict[str, Any]:
        """The figures of one model, as plain values."""
        found = quality(self.truth, probabilities, self.units, self.labels)
        return {name: found[name] for name in _FIGURES}


def ask_models(models: Sequence[Predictor], records: Records) -> Judgment:
    """Let each model predict the records.

    Raises:
        ModelError: The models do not have the same task and classes.
        DataError: The records have other classes, or there are none.
    """
    first = models[0]
    for model in models[1:]:
        check_same_kind(model, first.task, first.labels, model.model.loaded.folder.name)
    if not records.inputs:
        raise DataError(f"{records.source} holds no record that can be used: expected labeled records", code="data.no_records")
    truth = class_numbers(records.labels, first.labels, records.source)
    said = [np.concatenate(aligned_probabilities(model, first.labels, records.inputs)) for model in models]
    units = np.repeat(unit_numbers(records), [len(each) for each in truth])
    return Judgment(first.labels, tuple(said), np.concatenate(truth), units)


def measure_fusion(method: Method, judgment: Judgment, names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Return the figures of each model and of their fusion, all on the same records, as plain values.

    What is fitted is measured on records that it was not fitted on (five-fold cross-fitting). `against_best` compares the fusion
    with the single model that is most accurate on these records, which favors that model.

    Args:
        method: The rule.
        judgment: What the models say.
        names: Of the models.
        seed: Of the folds.

    Raises:
        DataError: There are too few records.
    """
    fused = cross_fitted(method, judgment.probabilities, judgment.truth, judgment.folds(seed))
    single = [judgment.figures(each) for each in judgment.probabilities]
    best = max(range(len(single)), key=lambda number: single[number]["accuracy"])
    against = compare_paired(judgment.answers(fused), judgment.answers(judgment.probabilities[best]))
    return {
        "method": method,
        "labels": list(judgment.labels),
        "answers": len(judgment.truth),
        "models": [{"model": name, **figures} for name, figures in zip(names, single, strict=True)],
        "fused": judgment.figures(fused),
        "against_best": {"model": names[best], **against.figures()},
    }


def fit_and_write(method: Method, judgment: Judgment, models: Sequence[Predictor], folder: Path) -> PredictionFusion:
    """Fit the rule on all records, and write the fused model.

    Args:
        method: The rule.
        judgment: Predictions of the models, and the true classes.
        models: To be fused.
        folder: Of the fused model.

    Raises:
        RunError: If the folder exists already.
        DataError: If `stacking` lacks a record of some class.
    """
    fusion = fit_fusion(method, judgment.probabilities, judgment.truth)
    write_fused(folder, fusion, [model.model.loaded.folder.path for model in models], models[0].task, judgment.labels)
    return fusion


def write_unfitted(method: Method, models: Sequence[Predictor], folder: Path) -> None:
    """Write a fused model of which nothing is fitted: probabilities as they are, and equal weights.

    Args:
        method: `vote` or `average`.
        models: To be fused.
        folder: Of the fused model.

    Raises:
        ModelError: The models do not have the same task and classes.
        RunError: The folder exists already.
    """
    first = models[0]
    for model in models[1:]:
        check_same_kind(model, first.task, first.labels, model.model.loaded.folder.name)
    count = len(models)
    fusion = PredictionFusion(method, (1.0,) * count, (1 / count,) * count)
    write_fused(folder, fusion, [model.model.loaded.folder.path for model in models], first.task, first.labels)
