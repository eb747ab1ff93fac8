"""A finished model on labeled records: the figures of `quality`, and of tags those of whole entities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.models.class_names import shown
from cotune.models.entities import entity_quality
from cotune.models.errors import DataError, nearest
from cotune.models.inputs import Label, names_in
from cotune.models.predictor import Predictor
from cotune.models.quality import NOT_TOLD, Threshold, quality, told_classes
from cotune.models.records import Records

_SHOWN = 5  # unknown classes that an error names
_NO_TAG = "O"


def judge_records(predictor: Predictor, records: Records, threshold: Threshold | None = None) -> dict[str, Any]:
    """Return how good a model is on records, as plain values.

    Raises:
        DataError: For classes that the model does not have.
    """
    truth = class_numbers(records.labels, predictor.labels, records.source)
    rows = predictor.probabilities(records.inputs)
    lengths = [len(each) for each in truth]
    probabilities = torch.cat(rows).numpy()
    units = np.repeat(_units(records), lengths)
    found = quality(np.concatenate(truth), probabilities, units, predictor.labels, threshold)
    if predictor.task == "token-classification":
        found["entities"] = _entities(records.labels, told_classes(probabilities, predictor.labels, threshold), predictor.labels)
    return {
        "task": predictor.task,
        "labels": list(predictor.labels),
        "max_length": predictor.max_length if predictor.model.loaded.task.key == "text" else None,
        "records": len(records),
        "left_out": dict(records.skipped),
        **found,
    }


def class_numbers(labels: Sequence[Label], known: Sequence[str], source: str) -> list[NDArray[np.int64]]:
    """Return the class number of each record, or those of its tags. Raises DataError for a class that is not known."""
    number = {label: i for i, label in enumerate(known)}
    strange = sorted({name for label in labels for name in names_in(label)} - number.keys())
    if strange:
        named = ", ".join(map(shown, strange[:_SHOWN])) + (f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else "")
        raise DataError(
            f"{source} holds classes that the model does not have ({named}): rename them, or drop their records"
            f"{nearest(strange[0], known)}"
        )
    return [np.asarray([number[name] for name in names_in(label)], dtype=np.int64) for label in labels]


def _units(records: Records) -> NDArray[np.int64]:
    """The number of each record's unit: itself, or whose it is."""
    if not records.units:
        return np.arange(len(records))
    numbers = {name: i for i, name in enumerate(dict.fromkeys(records.units))}
    return np.asarray([numbers[name] for name in records.units], dtype=np.int64)


def _entities(labels: Sequence[Label], told: NDArray[np.int64], known: Sequence[str]) -> dict[str, Any]:
    names = [*known, _NO_TAG]  # the last one, which NOT_TOLD is the number of: a word that was not read is in no entity
    assert NOT_TOLD == -1
    ends = np.cumsum([len(names_in(label)) for label in labels])[:-1]
    said = [[names[int(number)] for number in part] for part in np.split(told, ends)]
    return entity_quality([list(names_in(label)) for label in labels], said)
