"""What a model reads of a data set: its records as examples of the task, or as features of the frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from cotune.data.dataset import Dataset
from cotune.data.tasks.text import Example
from cotune.data.types import Input
from cotune.models.features.cached import answer_rows, get_features
from cotune.models.trainable import State, TrainableModel

Encoding = Callable[[str, int, int], None]  # (the file, its records that are encoded, its distinct records)


def encoded_examples(holdings: Dataset, model: TrainableModel) -> list[Example]:
    """Return what the task's collator takes, for each record."""
    loaded = model.loaded
    return loaded.task.examples(loaded.reader, loaded.max_length, holdings.inputs(), holdings.targets)


def encoded_features(
    holdings: Dataset, model: TrainableModel, state: State, precision: str, progress: Encoding | None = None
) -> torch.Tensor:
    """Return what the head reads of each record: (n, d); of tags, of each word of all records, as many as `truth` has.

    All records of a file are encoded, no matter who holds them: the next one who asks finds them on disk.
    """
    found = []
    for records, rows in holdings.parts:
        told = None if progress is None else partial(progress, records.source)
        features = get_features(model, records.inputs, state, precision, told)
        found.append(features[_answers(records.inputs, rows)])
    return torch.cat(found)


def _answers(inputs: Sequence[Input], rows: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
    """Where the answers of some records are among those of all."""
    if not any(isinstance(given, tuple) for given in inputs[:1]):
        return torch.as_tensor(rows)  # one answer each
    places = answer_rows(inputs)
    return torch.tensor([place for row in rows for place in places[int(row)]], dtype=torch.long)
