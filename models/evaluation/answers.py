"""Evaluate a finished model that does not predict classes: the metrics of its task, with an interval for one of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cotune.data.dataset import Dataset
from cotune.data.records import Records
from cotune.errors import DataError
from cotune.models.evaluation.predictor import Predictor, unit_numbers
from cotune.models.evaluation.summed_answers import judge_answers


def evaluate_answers(predictor: Predictor, records: Records) -> dict[str, Any]:
    """Return how good a model is on labeled records, as plain values; what cannot be read is in no figure.

    Raises:
        DataError: For labels that the model does not have, or where no record can be read.
    """
    held = Dataset(((records, np.arange(len(records))),), predictor.labels, predictor.task)
    predicted = predictor.answers(records.inputs)
    read = [row for row, answer in enumerate(predicted) if answer is not None]
    if not read:
        raise DataError(f"{records.source} holds no record that can be read: expected labeled records", code="data.no_records")
    targets = [held.targets[row] if isinstance(held.targets[row], tuple) else (held.targets[row],) for row in read]
    truth = [entry for target in targets for entry in target]
    given = [entry for row in read for entry in predicted[row] or ()]
    units = np.repeat(unit_numbers(records)[read], [len(target) for target in targets])
    metrics = predictor.model.loaded.task.metrics(truth, given, len(predictor.labels))
    return {
        "task": predictor.task,
        "labels": list(predictor.labels),
        "max_length": predictor.max_length,
        "records": len(records),
        "left_out": dict(records.skipped),
        "not_predicted": len(records) - len(read),
        "figures": judge_answers(predictor.task, metrics, truth, given, units).figures(),
    }
