"""Figures against numbers by hand, against definitions that are spelled out, and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import classification_report

from cotune.errors import DataError
from cotune.models.evaluation.quality import NOT_PREDICTED, Threshold, calibration, parse_threshold, predict_classes, quality

LABELS = ("bad", "good", "so")


def of(truth: list[int], probabilities: list[list[float]], **more: object) -> dict[str, object]:
    return quality(np.array(truth), np.array(probabilities), np.arange(len(truth)), LABELS[: len(probabilities[0])], **more)  # type: ignore[arg-type]


FOUR = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]]


def test_two_classes_by_hand() -> None:
    """True: bad, good, good, bad. Predicted: bad, bad, good, good."""
    found = of([0, 1, 1, 0], FOUR)
    assert found["accuracy"] == 0.5
    assert found["confusion"] == [[1, 1, 0], [1, 1, 0]]
    bad, good = found["classes"]  # type: ignore[misc]
    assert (bad["precision"], bad["recall"], bad["records"], bad["predicted"]) == (0.5, 0.5, 2, 2)
    assert good["auroc"] == 0.5  # of the pairs (0.4, 0.7) × (0.1, 0.8) two are in order
    assert good["auprc"] == pytest.approx(1 / 2 * 1 / 2 + 1 / 2 * 2 / 3)  # hits at ranks 2 and 3
    assert found["majority"] == {"label": "bad", "accuracy": 0.5}


def test_calibration_by_hand() -> None:
    """Confidences .9, .6, .7, .8 in bins of their own: right, wrong, right, wrong."""
    found = calibration(np.array([0, 1, 1, 0]), np.array(FOUR))
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.8) / 4)
    assert [each["answers"] for each in found["bins"]] == [1, 1, 1, 1]
    both = calibration(np.array([0, 1]), np.array([[0.95, 0.05], [0.97, 0.03]]))  # one bin, half of it right
    assert both["ece"] == pytest.approx(0.96 - 0.5)
    assert calibration(np.array([0]), np.array([[np.nan, np.nan]])) == {"ece": None, "bins": []}


def test_a_rare_class_is_told_from_its_threshold_on() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.2, 0.35, 0.45]])
    assert predict_classes(probabilities, LABELS).tolist() == [0, 0, 2]
    assert predict_classes(probabilities, LABELS, Threshold("good", 0.3)).tolist() == [1, 0, 1]
    assert predict_classes(probabilities, LABELS, Threshold("bad", 0.9)).tolist() == [1, 1, 2]  # the best of the others
    found = of([1, 0, 2], probabilities.tolist(), threshold=Threshold("good", 0.3))
    good = found["classes"][1]  # type: ignore[index]
    assert (good["precision"], good["recall"]) == (0.5, 1.0)
    at = {each["least"]: (each["precision"], each["recall"]) for each in good["thresholds"]}
    assert at[0.3] == (0.5, 1.0)
    assert at[0.02] == (1 / 3, 1.0)


def test_what_was_not_read_is_wrong_and_in_no_curve() -> None:
    unread = [np.nan, np.nan]
    found = of([0, 1, 1, 0, 1], [*FOUR, unread])
    assert (found["not_predicted"], found["accuracy"]) == (1, 0.4)
    assert found["confusion"] == [[1, 1, 0], [1, 1, 1]]
    good = found["classes"][1]  # type: ignore[index]
    assert (good["precision"], good["recall"], good["auroc"]) == (0.5, 1 / 3, 0.5)
    assert found["calibration"] == calibration(np.array([0, 1, 1, 0]), np.array(FOUR))


def test_a_curve_without_a_class_is_not_defined() -> None:
    found = of([0, 0], [[0.9, 0.1, 0.0], [0.4, 0.6, 0.0]])
    assert [each["auroc"] for each in found["classes"]] == [None] * 3  # type: ignore[union-attr]
    assert found["auroc"] is found["auprc"] is None


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    count = draw(st.integers(2, 30))
    raw = draw(st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=count, max_size=count))
    truth = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    values = np.array(raw, dtype=np.float64)
    return np.array(truth), values / values.sum(axis=1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_any_records_against_definitions(case: tuple[NDArray[np.int64], NDArray[np.float64]]) -> None:
    truth, probabilities = case
    found = quality(truth, probabilities, np.arange(len(truth)), LABELS)
    predicted = probabilities.argmax(axis=1)
    oracle = classification_report(truth, predicted, labels=[0, 1, 2], target_names=LABELS, output_dict=True, zero_division=0)
    for each in found["classes"]:
        expected = oracle[each["label"]]
        assert [each[key] for key in ("precision", "recall", "f1", "records")] == pytest.approx(
            [expected[key] for key in ("precision", "recall", "f1-score", "support")]
        )
        number = LABELS.index(each["label"])
        ours = probabilities[truth == number, number]
        theirs = probabilities[truth != number, number]
        if len(ours) and len(theirs):  # Mann & Whitney: the share of the pairs that are in order
            pairs = ours[:, None] - theirs[None, :]
            assert each["auroc"] == pytest.approx(float(((pairs > 0) + 0.5 * (pairs == 0)).mean()))
    assert found["macro"]["f1"] == pytest.approx(oracle["macro avg"]["f1-score"])
    assert found["weighted"]["f1"] == pytest.approx(oracle["weighted avg"]["f1-score"])
    assert found["micro"]["precision"] == pytest.approx(found["accuracy"])  # one class for each record
    assert np.sum(found["confusion"]) == len(truth)
    assert np.trace(np.array(found["confusion"])[:, :3]) == round(found["accuracy"] * len(truth))


@pytest.mark.parametrize("text", ["good", "good=", "good=2", "good=0", "=0.5", "god=0.5", "good=half"])
def test_thresholds_that_are_none(text: str) -> None:
    with pytest.raises(DataError):
        parse_threshold(text, LABELS)


def test_a_threshold_of_a_class_with_an_equals_sign() -> None:
    assert parse_threshold("a=b=0.25", ("a=b", "c")) == Threshold("a=b", 0.25)
    assert NOT_PREDICTED not in range(len(LABELS))
