"""Fusion of predictions: vote, average, weighted average and stacking of models with the same classes.

The models may be of any architecture and tokenizer: only their probabilities are fused. Each model's are calibrated first. What
is fitted (temperatures, weights, the meta-model) is fitted on records that no model was trained on, and is measured by
`cross_fitted` on records that it was not fitted on either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from cotune.ensembles.calibration import Floats, Numbers, fit_temperature, scaled
from cotune.errors import DataError
from cotune.models.config import Method
from cotune.strategies.sums import average

_EM_STEPS = 500
_TIE = 1e-6  # weight of the mean probabilities beside votes: decides between classes with as many votes
_STRENGTH = 1.0  # inverse strength of the meta-model's L2 penalty, as scikit-learn has it


@dataclass(frozen=True)
class MetaModel:
    """Multinomial logistic regression on the logarithms of all models' probabilities (Wolpert, Neural Networks 1992).

    Attributes:
        coefficients: (classes, models · classes).
        intercepts: (classes,).
    """

    coefficients: Floats
    intercepts: Floats

    def probabilities(self, features: Floats) -> Floats:
        """(n, models · classes) -> (n, classes)."""
        scores = features @ self.coefficients.T + self.intercepts
        fused: Floats = softmax(scores, axis=1)
        return fused


@dataclass(frozen=True)
class PredictionFusion:
    """A fitted rule that makes one prediction of several.

    Attributes:
        method: The rule.
        temperatures: One for each model.
        weights: One for each model, at least 0, together 1; equal ones for `vote` and `average`, unused by `stacking`.
        meta_model: Of `stacking`.
    """

    method: Method
    temperatures: tuple[float, ...]
    weights: tuple[float, ...]
    meta_model: MetaModel | None = None

    def fuse(self, probabilities: Sequence[Floats]) -> Floats:
        """Fuse what the models say of n records.

        Args:
            probabilities: (n, classes) of each model; a row of NaN where a model could not read the record.

        Returns:
            (n, classes); a row of NaN where no model could read the record.
        """
        calibrated = _calibrated(probabilities, self.temperatures)
        if self.meta_model is not None:
            fused = self.meta_model.probabilities(_features(calibrated))
            fused[np.all(np.isnan(calibrated), axis=(0, 2))] = np.nan
            return fused
        mean = weighted_mean(calibrated, np.asarray(self.weights))
        if self.method != "vote":
            return mean
        return (1 - _TIE) * weighted_mean(_votes(calibrated), np.asarray(self.weights)) + _TIE * mean


def fit_fusion(method: Method, probabilities: Sequence[Floats], truth: Numbers) -> PredictionFusion:
    """Fit a rule on held-out records.

    Args:
        method: The rule.
        probabilities: (n, classes) of each model.
        truth: (n,) class numbers.

    Raises:
        DataError: `stacking` needs a record of every class.
    """
    read = [~np.isnan(each).any(axis=1) for each in probabilities]
    temperatures = tuple(fit_temperature(each[rows], truth[rows]) for each, rows in zip(probabilities, read, strict=True))
    calibrated = _calibrated(probabilities, temperatures)
    weights = np.full(len(probabilities), 1 / len(probabilities))
    if method == "weighted":
        weights = fit_weights(calibrated, truth)
    meta_model = fit_meta_model(calibrated, truth) if method == "stacking" else None
    return PredictionFusion(method, temperatures, tuple(map(float, weights)), meta_model)


def weighted_mean(probabilities: Floats, weights: Floats) -> Floats:
    """Return Σ_i w_i p_i over the models that could read a record, with their weights scaled to add up to 1.

    Args:
        probabilities: (models, n, classes); rows of NaN where a model could not read a record.
        weights: (models,).

    Returns:
        (n, classes); a row of NaN where no model with a weight could read the record.
    """
    read = _is_read(probabilities)
    counted = (weights[:, None] * read)[:, :, None]
    known = np.where(read[:, :, None], probabilities, 0.0)
    mean: Floats = average([*torch.from_numpy(known)], [*torch.from_numpy(counted)]).numpy()
    mean[counted.sum(axis=0)[:, 0] <= 0] = np.nan
    return mean


def fit_weights(probabilities: Floats, truth: Numbers) -> Floats:
    """Return the weights on the simplex with the largest likelihood of the true classes under the weighted mean.

    They are those of a mixture of fixed distributions, found by expectation maximization: the likelihood is concave in them and
    never falls (Jacobs et al., Neural Computation 1991; w_i ← mean_n w_i p_i(y_n) / Σ_j w_j p_j(y_n)).

    Args:
        probabilities: (models, n, classes); a model that could not read a record counts as one that knows nothing of it.
        truth: (n,) class numbers.

    Returns:
        (models,), at least 0, together 1.
    """
    of_truth = _without_gaps(probabilities)[:, np.arange(len(truth)), truth]
    weights = np.full(len(of_truth), 1 / len(of_truth))
    if not len(truth):
        return weights
    for _ in range(_EM_STEPS):
        parts = weights[:, None] * np.maximum(of_truth, 1e-12)
        weights = (parts / parts.sum(axis=0)).mean(axis=1)
    return weights


def fit_meta_model(probabilities: Floats, truth: Numbers) -> MetaModel:
    """Fit the meta-model of stacking.

    Args:
        probabilities: (models, n, classes), calibrated.
        truth: (n,) class numbers.

    Raises:
        DataError: A class has no record.
    """
    from sklearn.linear_model import LogisticRegression  # its import takes a second

    classes = probabilities.shape[2]
    missing = sorted(set(range(classes)) - set(truth.tolist()))
    if missing:
        raise DataError(
            f"stacking needs records of all {classes} classes, and has none of {len(missing)} of them: give more records, or use"
            " the method weighted",
            code="data.class_without_records",
        )
    fitted = LogisticRegression(C=_STRENGTH, max_iter=1000).fit(_features(probabilities), truth)
    if classes > 2:
        return MetaModel(np.asarray(fitted.coef_), np.asarray(fitted.intercept_))
    half = np.asarray(fitted.coef_) / 2  # of two classes, scikit-learn keeps the difference of the scores
    return MetaModel(np.concatenate([-half, half]), np.concatenate([-fitted.intercept_ / 2, fitted.intercept_ / 2]))


def cross_fitted(method: Method, probabilities: Sequence[Floats], truth: Numbers, fold: Numbers) -> Floats:
    """Return fused predictions for each record by a rule that was fitted on the other folds.

    Args:
        method: The rule.
        probabilities: (n, classes) of each model.
        truth: (n,) class numbers.
        fold: (n,) the fold of each answer, as `assign_folds` deals them.

    Returns:
        (n, classes).

    Raises:
        DataError: As in `fit_fusion`.
    """
    fused = np.empty_like(probabilities[0])
    for number in np.unique(fold):
        held = fold == number
        rule = fit_fusion(method, [each[~held] for each in probabilities], truth[~held])
        fused[held] = rule.fuse([each[held] for each in probabilities])
    return fused


def assign_folds(classes: Numbers, folds: int, seed: int) -> Numbers:
    """Return the fold of each record, (n,): the records of each class are spread evenly, in an order drawn from the seed.

    Args:
        classes: (n,) a class number of each record.
        folds: How many.
        seed: Of the order.

    Raises:
        DataError: There are fewer records than folds.
    """
    if len(classes) < folds:
        raise DataError(
            f"{len(classes)} records are too few to fit a fusion and to measure it: expected at least {folds}",
            code="data.too_few_records",
        )
    order = np.random.default_rng(seed).permutation(len(classes))
    by_class = order[np.argsort(classes[order], kind="stable")]
    fold = np.empty(len(classes), dtype=np.int64)
    fold[by_class] = np.arange(len(classes)) % folds
    return fold


def _calibrated(probabilities: Sequence[Floats], temperatures: Sequence[float]) -> Floats:
    """(models, n, classes)."""
    return np.stack([scaled(each, t) for each, t in zip(probabilities, temperatures, strict=True)])


def _is_read(probabilities: Floats) -> NDArray[np.bool_]:
    """(models, n) whether a model could read a record."""
    read: NDArray[np.bool_] = np.logical_not(np.isnan(probabilities).any(axis=2))
    return read


def _votes(probabilities: Floats) -> Floats:
    """One vote of each model for its most probable class: (models, n, classes), NaN where a model has none."""
    votes: Floats = np.eye(probabilities.shape[2])[_without_gaps(probabilities).argmax(axis=2)]
    votes[~_is_read(probabilities)] = np.nan
    return votes


def _without_gaps(probabilities: Floats) -> Floats:
    """Replace rows of NaN, which a model could not read, by equal probabilities."""
    return np.where(np.isnan(probabilities), 1 / probabilities.shape[2], probabilities)


def _features(probabilities: Floats) -> Floats:
    """(models, n, classes) -> (n, models · classes), logarithms."""
    logs = np.log(np.maximum(_without_gaps(probabilities), 1e-6))
    return np.concatenate(list(logs), axis=1)
