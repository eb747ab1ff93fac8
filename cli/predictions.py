"""What `cotune predict` and `cotune evaluate` compute: a model and records are read, and every record gets its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cotune.cli.plan_options import own_options
from cotune.data.config import DataConfig
from cotune.data.record_files import read_records
from cotune.data.unlabeled import Row, read_typed, read_unlabeled
from cotune.ensembles.predictor import open_model
from cotune.models.evaluation.predictor import Classifier, evaluate_classifier
from cotune.models.evaluation.quality import NOT_PREDICTED, Threshold, parse_threshold, predict_classes


def predict_rows(
    model: str,
    inputs: Path | Sequence[str],
    *,
    column: str | None,
    encoding: str,
    threshold: str | None,
    max_length: int | None,
    device: str,
) -> list[dict[str, Any]]:
    """Return one plain table for each input, in order, with the answer of a model.

    Args:
        model: A folder of a model or a run, or a hub id.
        inputs: A file or folder, or the texts or images' files themselves.
        column: That holds the inputs in a file; None: as the task names it.
        encoding: Of a file of text.
        threshold: As `CLASS=P`; None: the best class is told.
        max_length: Tokens that are read of a text; None: as in training.
        device: What computes.
    """
    predictor = open_model(model, device, max_length)
    limit = None if threshold is None else parse_threshold(threshold, predictor.labels)
    with own_options():
        if isinstance(inputs, Path):
            rows = read_unlabeled(inputs, predictor.task, column=column, encoding=encoding)
        else:
            rows = read_typed(list(inputs), predictor.task)
    return list(_predictions(predictor, rows, limit))


def evaluate_records(
    model: str, data: DataConfig, *, threshold: str | None, max_length: int | None, device: str
) -> dict[str, Any]:
    """Return how good a model is on labeled records.

    Args:
        model: A folder of a model or a run, or a hub id.
        data: The records and how they are read.
        threshold: As `CLASS=P`; None: the best class is told.
        max_length: Tokens that are read of a text; None: as in training.
        device: What computes.
    """
    predictor = open_model(model, device, max_length)
    limit = None if threshold is None else parse_threshold(threshold, predictor.labels)
    with own_options():
        records = read_records(data, None, predictor.task)
    return dict(evaluate_classifier(predictor, records, limit))


def _predictions(predictor: Classifier, rows: Sequence[Row], threshold: Threshold | None) -> Iterator[dict[str, Any]]:
    """One plain table for each row, in order."""
    probabilities = iter(predictor.probabilities([row.given for row in rows if row.given is not None]))
    for number, row in enumerate(rows, 1):
        about = {"row": number, "input": row.shown}
        if row.given is None:
            yield {**about, "label": None, "score": None, "scores": None, "reason": row.reason}
        else:
            yield {**about, **_answer(predictor, next(probabilities), threshold), "reason": ""}


def _answer(predictor: Classifier, probabilities: Tensor, threshold: Threshold | None) -> dict[str, Any]:
    """One class; of words a list of tags, None for one that was not read."""

    numbers = predict_classes(probabilities.numpy(), predictor.labels, threshold).tolist()
    labels = [None if number == NOT_PREDICTED else predictor.labels[number] for number in numbers]
    rows = [dict(zip(predictor.labels, row, strict=True)) for row in probabilities.tolist()]
    scores = [None if label is None else row[label] for label, row in zip(labels, rows, strict=True)]
    every = [None if label is None else row for label, row in zip(labels, rows, strict=True)]
    if predictor.task == "token-classification":
        return {"label": labels, "score": scores, "scores": every}
    return {"label": labels[0], "score": scores[0], "scores": every[0]}
