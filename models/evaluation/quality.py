"""Evaluate a classifier on labeled records: by class, over all thresholds, and its calibration; for tags, also by entity.

Probabilities are (n, c), one row for each answer: a record's class, or a word's tag. A row of NaN is an answer that the model
cannot give, such as the tag of a word that its length cuts off: it counts as wrong, and in no curve and no calibration.

Entities in tags, and how many of them a model finds whole: from the first to the last word, and of the right type.

Tags are read as the CoNLL-2000 evaluation does (and the seqeval package by default): B- begins an entity, I- continues one of its
type and begins one otherwise, E- ends one, S- is one by itself. A tag without a prefix continues one of its type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.errors import DataError, nearest
from cotune.models.evaluation.intervals import Answers, accuracy_interval, f1_interval

NOT_PREDICTED = -1  # the class number of an answer that was not given
_BINS = 15
_THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Threshold:
    """One class is predicted wherever its probability is at least so large; elsewhere the most probable of the others."""

    label: str
    least: float


def parse_threshold(text: str, labels: Sequence[str]) -> Threshold:
    """Read CLASS=PROBABILITY. Raises DataError."""
    label, _, number = text.rpartition("=")
    try:
        least = float(number)
    except ValueError:
        least = -1.0
    if not label or not 0 < least < 1:
        raise DataError(
            f"the threshold {text!r} is not understood: expected CLASS=PROBABILITY, such as {labels[0]}=0.3",
            code="data.threshold",
        )
    if label not in labels:
        raise DataError(
            f"the threshold is for the class {label!r}, which the model does not have{nearest(label, labels)}",
            code="data.threshold",
        )
    return Threshold(label, least)


def predict_classes(probabilities: Floats, labels: Sequence[str], threshold: Threshold | None = None) -> Numbers:
    """Return the predicted class number of each row; NOT_PREDICTED for a row of NaN.

    Args:
        probabilities: (n, classes).
        labels: The classes.
        threshold: A class that is predicted exactly if its probability reaches a value; None: predict the most probable class.
    """
    read = ~np.isnan(probabilities).any(axis=1)
    predicted = np.full(len(probabilities), NOT_PREDICTED, dtype=np.int64)
    predicted[read] = probabilities[read].argmax(axis=1)
    if threshold is not None:
        number = list(labels).index(threshold.label)
        others = probabilities[read].copy()
        others[:, number] = -1.0
        predicted[read] = np.where(probabilities[read, number] >= threshold.least, number, others.argmax(axis=1))
    return predicted


def quality(
    truth: Numbers, probabilities: Floats, units: Numbers, labels: Sequence[str], threshold: Threshold | None = None
) -> dict[str, Any]:
    """Return all figures as plain values; None where one is not defined, such as a curve of a class that no record has.

    Args:
        truth: (n,) class numbers.
        probabilities: (n, c).
        units: (n,) the number of the unit (a record, or whose it is) of each answer, which intervals are drawn from.
        labels: Class names.
        threshold: Of one class; None: the most probable class is predicted.
    """
    predicted = predict_classes(probabilities, labels, threshold)
    answers = Answers(truth, predicted, units, len(labels))
    most = int(np.bincount(truth, minlength=len(labels)).argmax())
    return {
        "answers": len(truth),
        "not_predicted": int((predicted == NOT_PREDICTED).sum()),
        "accuracy": float(answers.right.mean()),
        "accuracy_interval": list(accuracy_interval(answers)),
        "majority": {"label": labels[most], "accuracy": float((truth == most).mean())},
        "threshold": None if threshold is None else {"label": threshold.label, "least": threshold.least},
        "macro": {**_mean(truth, predicted, len(labels), "macro"), "f1_interval": list(f1_interval(answers))},
        "micro": _mean(truth, predicted, len(labels), "micro"),
        "weighted": _mean(truth, predicted, len(labels), "weighted"),
        **_by_class(truth, predicted, probabilities, labels),
        "confusion": _confusion(truth, predicted, len(labels)),
        "calibration": calibration(truth, probabilities),
    }


def _mean(truth: Numbers, predicted: Numbers, classes: int, how: str) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support  # its import takes a second

    values = precision_recall_fscore_support(truth, predicted, labels=range(classes), average=how, zero_division=0)
    return dict(zip(("precision", "recall", "f1"), map(float, values[:3]), strict=True))


def _by_class(truth: Numbers, predicted: Numbers, probabilities: Floats, labels: Sequence[str]) -> dict[str, Any]:
    from sklearn.metrics import precision_recall_fscore_support

    classes = range(len(labels))
    columns = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0)
    read = ~np.isnan(probabilities).any(axis=1)
    rows = []
    for number, precision, recall, f1, count in zip(classes, *columns, strict=True):
        is_class = truth[read] == number
        scores = probabilities[read, number]
        rows.append(
            {
                "label": labels[number],
                "records": int(count),
                "predicted": int((predicted == number).sum()),
                "precision": float(precision),
                "recall": float(recall),
                "f1": float(f1),
                **_curves(is_class, scores),
                "thresholds": _thresholds(is_class, scores),
            }
        )
    return {"auroc": _defined_mean(rows, "auroc"), "auprc": _defined_mean(rows, "auprc"), "classes": rows}


def _curves(is_class: NDArray[np.bool_], scores: Floats) -> dict[str, float | None]:
    """Of one class against all others. AUPRC is average precision, without interpolation."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if not is_class.any() or is_class.all():
        return {"auroc": None, "auprc": None}
    return {"auroc": float(roc_auc_score(is_class, scores)), "auprc": float(average_precision_score(is_class, scores))}


def _thresholds(is_class: NDArray[np.bool_], scores: Floats) -> list[dict[str, float]]:
    """What telling the class from each probability on would reach."""
    found = []
    for least in _THRESHOLDS:
        right = int((is_class & (scores >= least)).sum())
        predicted = int((scores >= least).sum())
        there = int(is_class.sum())
        precision = right / predicted if predicted else 0.0
        recall = right / there if there else 0.0
        f1 = 2 * right / (predicted + there) if predicted + there else 0.0
        found.append({"least": least, "precision": precision, "recall": recall, "f1": f1})
    return found


def _defined_mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    known = [row[key] for row in rows if row[key] is not None]
    return sum(known) / len(known) if known else None


def _confusion(truth: Numbers, predicted: Numbers, classes: int) -> list[list[int]]:
    """(true class, predicted class); the last column counts records without a prediction."""
    table = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(table, (truth, np.where(predicted == NOT_PREDICTED, classes, predicted)), 1)
    rows: list[list[int]] = table.tolist()
    return rows


def calibration(truth: Numbers, probabilities: Floats) -> dict[str, Any]:
    """Return the expected calibration error of the most probable class, and its bins.

    Source: Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599, equation 3: M = 15 bins (a, b] of equal width.
    """
    read = ~np.isnan(probabilities).any(axis=1)
    if not read.any():
        return {"ece": None, "bins": []}
    confidence = probabilities[read].max(axis=1)
    right = probabilities[read].argmax(axis=1) == truth[read]
    place = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    bins = []
    for number in np.unique(place):
        inside = place == number
        edges = {"from": number / _BINS, "to": (number + 1) / _BINS, "answers": int(inside.sum())}
        bins.append({**edges, "confidence": float(confidence[inside].mean()), "accuracy": float(right[inside].mean())})
    ece = sum(each["answers"] * abs(each["confidence"] - each["accuracy"]) for each in bins) / int(read.sum())
    return {"ece": float(ece), "bins": bins}


Entity = tuple[str, int, int]  # type, first word, last word
_OUTSIDE = "O"
_PREFIXES = ("B", "I", "E", "S")


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of one text, in order.

    >>> find_entities(["B-PER", "I-PER", "O", "B-LOC", "I-PER"])
    [('PER', 0, 1), ('LOC', 3, 3), ('PER', 4, 4)]
    """
    found: list[Entity] = []
    begun = -1
    kind = ""
    last = ""
    for place, tag in enumerate([*tags, _OUTSIDE]):
        prefix, name = _parts(tag)
        goes_on = begun >= 0 and tag != _OUTSIDE and name == kind and prefix not in ("B", "S") and last not in ("E", "S")
        if begun >= 0 and not goes_on:
            found.append((kind, begun, place - 1))
            begun = -1
        if tag != _OUTSIDE and not goes_on:
            begun = place
        kind = name
        last = prefix
    return found


def _parts(tag: str) -> tuple[str, str]:
    """(prefix, type); the prefix of a tag without one is I."""
    if tag == _OUTSIDE:
        return "", ""
    prefix, dash, name = tag.partition("-")
    if not dash and prefix in _PREFIXES:
        return prefix, ""
    return (prefix, name) if dash and prefix in _PREFIXES else ("I", tag)


def entity_quality(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Return precision, recall and F1 over all entities (micro), as the mean over the types (macro), and of each type.

    Args:
        truth: The tags of each text.
        predicted: As many, of the same texts.
    """
    there = Counter[str]()
    given = Counter[str]()
    right = Counter[str]()
    for true_tags, predicted_tags in zip(truth, predicted, strict=True):
        true_ones = set(find_entities(true_tags))
        predicted_ones = set(find_entities(predicted_tags))
        there.update(kind for kind, _, _ in true_ones)
        given.update(kind for kind, _, _ in predicted_ones)
        right.update(kind for kind, _, _ in true_ones & predicted_ones)
    types: list[dict[str, Any]] = [
        {"type": kind, "entities": there[kind], "predicted": given[kind], **_figures(right[kind], given[kind], there[kind])}
        for kind in sorted(there | given)
    ]
    return {
        "entities": there.total(),
        "predicted": given.total(),
        "micro": _figures(right.total(), given.total(), there.total()),
        "macro": {key: sum(each[key] for each in types) / len(types) if types else 0.0 for key in ("precision", "recall", "f1")},
        "types": types,
    }


def _figures(right: int, predicted: int, there: int) -> dict[str, float]:
    return {
        "precision": right / predicted if predicted else 0.0,
        "recall": right / there if there else 0.0,
        "f1": 2 * right / (predicted + there) if predicted + there else 0.0,
    }
