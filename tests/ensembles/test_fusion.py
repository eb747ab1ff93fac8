"""Fusion of predictions against hand-computed numbers and independent optimizers."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from cotune.ensembles.calibration import fit_temperature, negative_log_likelihood, scaled
from cotune.ensembles.fusion import assign_folds, cross_fitted, fit_fusion, fit_weights, weighted_mean
from cotune.errors import DataError
from cotune.models.config import Method

METHODS = get_args(Method)
NAN = float("nan")


def predictions(seed: int = 0, records: int = 400, classes: int = 3, sharpness: tuple[float, ...] = (2.0, 1.0, 0.2)):
    """Models that know the truth more or less well."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, records)
    known = np.eye(classes)[truth]
    scores = [strength * known + rng.normal(size=(records, classes)) for strength in sharpness]
    powers = [np.exp(each) for each in scores]
    return [each / each.sum(axis=1, keepdims=True) for each in powers], truth


def test_scaling_by_a_temperature_is_softmax_of_divided_scores() -> None:
    scores = np.array([[1.0, 2.0, 4.0]])
    softmax = np.exp(scores) / np.exp(scores).sum()
    halved = np.exp(scores / 2) / np.exp(scores / 2).sum()
    assert scaled(softmax, 2.0) == pytest.approx(halved)
    assert scaled(softmax, 1.0) == pytest.approx(softmax)


def test_a_fitted_temperature_undoes_a_wrong_one() -> None:
    """Probabilities of a calibrated model, sharpened by T = 1/3, need T = 3."""
    rng = np.random.default_rng(0)
    right = rng.dirichlet(np.ones(4), size=20_000)
    truth = np.array([rng.choice(4, p=row) for row in right])
    assert fit_temperature(scaled(right, 1 / 3), truth) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(right, truth) == pytest.approx(1.0, rel=0.05)


def test_a_fitted_temperature_is_no_worse_than_any_of_a_grid() -> None:
    probabilities, truth = predictions()
    best = negative_log_likelihood(scaled(probabilities[0], fit_temperature(probabilities[0], truth)), truth)
    grid = [negative_log_likelihood(scaled(probabilities[0], t), truth) for t in np.geomspace(0.05, 20, 200)]
    assert best <= min(grid) + 1e-6


def test_weights_are_those_that_a_general_optimizer_finds() -> None:
    probabilities, truth = predictions(1)
    stacked = np.stack(probabilities)
    of_truth = stacked[:, np.arange(len(truth)), truth]
    start = np.full(3, 1 / 3)
    constraint = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = minimize(lambda w: -np.log(w @ of_truth).mean(), start, bounds=[(1e-9, 1)] * 3, constraints=constraint, tol=1e-12)
    weights = fit_weights(stacked, truth)
    assert weights.sum() == pytest.approx(1.0)
    assert -np.log(weights @ of_truth).mean() <= found.fun + 1e-6
    assert weights == pytest.approx(found.x, abs=0.01)


@given(seed=st.integers(0, 1000))
def test_weights_are_no_worse_than_equal_ones(seed: int) -> None:
    probabilities, truth = predictions(seed, records=30)
    stacked = np.stack(probabilities)
    weights = fit_weights(stacked, truth)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0)
    fitted = negative_log_likelihood(weighted_mean(stacked, weights), truth)
    assert fitted <= negative_log_likelihood(stacked.mean(axis=0), truth) + 1e-9


def test_a_vote_goes_to_the_class_that_most_models_tell() -> None:
    says = [np.array([[0.9, 0.1, 0.0]]), np.array([[0.2, 0.5, 0.3]]), np.array([[0.2, 0.5, 0.3]])]
    rule = fit_fusion("vote", [np.repeat(each, 2, axis=0) for each in says], np.array([1, 1]))
    assert rule.fuse(says).argmax() == 1
    assert rule.fuse(says)[0] == pytest.approx([1 / 3, 2 / 3, 0], abs=1e-5)


def test_votes_that_are_even_are_decided_by_the_mean() -> None:
    says = [np.array([[0.51, 0.49]]), np.array([[0.1, 0.9]])]
    probabilities, truth = predictions(classes=2, sharpness=(1.0, 1.0))
    rule = fit_fusion("vote", probabilities, truth)
    assert rule.fuse(says).argmax() == 1


def test_an_average_is_the_mean_of_calibrated_probabilities() -> None:
    probabilities, truth = predictions(2)
    rule = fit_fusion("average", probabilities, truth)
    by_hand = np.mean([scaled(p, t) for p, t in zip(probabilities, rule.temperatures, strict=True)], axis=0)
    assert rule.fuse(probabilities) == pytest.approx(by_hand)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_stacking_is_logistic_regression_on_log_probabilities(classes: int) -> None:
    probabilities, truth = predictions(3, classes=classes)
    rule = fit_fusion("stacking", probabilities, truth)
    calibrated = [scaled(p, t) for p, t in zip(probabilities, rule.temperatures, strict=True)]
    features = np.log(np.maximum(np.concatenate(calibrated, axis=1), 1e-6))
    oracle = LogisticRegression(max_iter=1000).fit(features, truth).predict_proba(features)
    assert rule.fuse(probabilities) == pytest.approx(oracle, abs=1e-6)


def test_stacking_without_records_of_a_class_is_refused() -> None:
    probabilities, truth = predictions(4)
    held = truth != 2
    with pytest.raises(DataError) as caught:
        fit_fusion("stacking", [each[held] for each in probabilities], truth[held])
    assert caught.value.code == "data.class_without_records"


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_cannot_read_a_record_abstains(method: Method) -> None:
    probabilities, truth = predictions(5)
    rule = fit_fusion(method, probabilities, truth)
    first, *others = [each[:3].copy() for each in probabilities]
    first[0] = NAN
    unread = [each.copy() for each in (first, *others)]
    for each in unread:
        each[2] = NAN
    fused = rule.fuse(unread)
    assert np.isfinite(fused[:2]).all()
    assert np.isnan(fused[2]).all()
    assert fused[0].sum() == pytest.approx(1.0)
    if method == "average":
        rest = [scaled(each[:1], t) for each, t in zip(others, rule.temperatures[1:], strict=True)]
        assert fused[:1] == pytest.approx(np.mean(rest, axis=0))


@pytest.mark.parametrize("method", METHODS)
def test_fused_predictions_beat_the_worst_model(method: Method) -> None:
    probabilities, truth = predictions(6, records=1000)
    fused = cross_fitted(method, probabilities, truth, assign_folds(truth, 5, seed=0))
    accuracy = [(each.argmax(axis=1) == truth).mean() for each in probabilities]
    assert (fused.argmax(axis=1) == truth).mean() > min(accuracy)
    assert fused.sum(axis=1) == pytest.approx(np.ones(len(truth)))


def test_useless_models_do_not_get_weight() -> None:
    """A model of noise among good ones: the fitted weights leave it out, equal ones do not."""
    probabilities, truth = predictions(7, records=2000, sharpness=(2.0, 2.0, 0.0))
    weights = fit_fusion("weighted", probabilities, truth).weights
    assert weights[2] < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_records_are_fused_by_a_rule_that_has_not_seen_them(method: Method) -> None:
    probabilities, truth = predictions(8)
    fold = assign_folds(truth, 4, seed=3)
    fused = cross_fitted(method, probabilities, truth, fold)
    held = fold == 2
    rule = fit_fusion(method, [each[~held] for each in probabilities], truth[~held])
    assert fused[held] == pytest.approx(rule.fuse([each[held] for each in probabilities]))


@given(truth=st.lists(st.integers(0, 3), min_size=5, max_size=60), seed=st.integers(0, 10))
def test_classes_are_spread_evenly_over_folds(truth: list[int], seed: int) -> None:
    numbers = np.array(truth)
    fold = assign_folds(numbers, 5, seed)
    for number in set(truth):
        counts = np.bincount(fold[numbers == number], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_fewer_records_than_folds_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        assign_folds(np.array([0, 1, 0, 1]), 5, seed=0)
    assert caught.value.code == "data.too_few_records"
