"""Encode the records of a data set for a model: as examples of the task, or as features of the frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotune.data.dataset import Dataset
from cotune.data.tasks.text import Example
from cotune.data.types import Input
from cotune.models.features.cached import answer_rows, find_unreadable, get_features
from cotune.models.trainable import State, TrainableModel

Encoding = Callable[[str, int, int], None]  # (the file, its records that are encoded, its distinct records)


def encoded_examples(dataset: Dataset, model: TrainableModel) -> list[Example]:
    """Return what the task's collator takes, for each record."""
    loaded = model.loaded
    return loaded.task.examples(loaded.reader, loaded.max_length, dataset.inputs(), dataset.targets)


@dataclass(frozen=True)
class FeatureRows:
    """Features of records, as rows among those of a whole file: that tensor is shared by all who hold records of the file.

    Attributes:
        features: Of the file, (m, d); NaN where a record, or a word, could not be read.
        places: Which of its rows are meant, (n,).
        unreadable: Which of those hold NaN, (n,).
    """

    features: Tensor
    places: Tensor
    unreadable: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureRows:
        """Return all rows of a tensor."""
        return cls(features, torch.arange(len(features)), features.isnan().any(dim=1))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def width(self) -> int:
        """How many numbers a row has: d."""
        return self.features.shape[1]

    @cached_property
    def _some_unreadable(self) -> bool:
        return bool(self.unreadable.any())

    def copy(self) -> Tensor:
        """Return the rows by themselves, (n, d)."""
        return self.features[self.places]

    def copy_into(self, target: Tensor, rows: Tensor) -> None:
        """Copy some of the rows into the first ones of a contiguous (k, d); one that could not be read becomes 0.

        rows: Their numbers, at most k, in 0 … n − 1.
        """
        into = target[: len(rows)]
        torch.index_select(self.features, 0, self.places[rows], out=into)
        if self._some_unreadable:
            into[self.unreadable[rows]] = 0.0


def find_features(
    dataset: Dataset, model: TrainableModel, state: State, precision: str, progress: Encoding | None = None
) -> FeatureRows:
    """Return what the head reads: a row for each record; for tags, a row for each word of all records.

    All records of a file are encoded at once, whichever organization has them, and cached. Rows are copied only if the records
    come from several files.

    Args:
        dataset: The records.
        model: With a frozen encoder.
        state: Parameters that differ from those of the base model.
        precision: Of the encoder's arithmetic.
        progress: Called with the source and the progress of encoding; None: not reported.
    """
    found = []
    for records, rows in dataset.parts:
        told = None if progress is None else partial(progress, records.source)
        features = get_features(model, records.inputs, state, precision, told)
        places = _answers(records.inputs, rows)
        of_file = FeatureRows(features, places, find_unreadable(features)[places])
        if len(dataset.parts) == 1:
            return of_file
        found.append(of_file.copy())
    return FeatureRows.of(torch.cat(found))


def encoded_features(dataset: Dataset, model: TrainableModel, state: State, precision: str) -> Tensor:
    """Return the rows of `find_features`, for the same arguments, as a new tensor (n, d).

    Args:
        dataset: The n records.
        model: The model, set to `state`.
        state: What was trained in the encoder so far.
        precision: As in the plan.
    """
    return find_features(dataset, model, state, precision).copy()


def _answers(inputs: Sequence[Input], rows: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    """Where the answers of some records are among those of all."""
    if not any(isinstance(given, tuple) for given in inputs[:1]):
        return torch.as_tensor(rows)  # one answer each
    places = answer_rows(inputs)
    return torch.tensor([place for row in rows for place in places[int(row)]], dtype=torch.long)
