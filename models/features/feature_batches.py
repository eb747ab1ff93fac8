"""The shapes of the batches in which features are computed: a record's own length decides its batch's, and nothing else does.

A pass over many records needs no large batches: on a processor a batch of 16 rows takes as long for each token as one of 64, and
leaves fewer slots empty in the last batch of a length. A GPU idles on so few.

The attention mask must hide something in every batch (see `data.inputs.batching`). A slot that is always blank does that, and one
of 16 is dear. So a record's row is longer than the record, by one hidden position at least, and only the longest batches, which a
record can fill, keep a blank slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cotune.data.inputs.batching import FINE_LENGTHS, fixed_batches
from cotune.data.tasks.text import Example
from cotune.models.synthetic_batches import bucket_lengths
from cotune.models.trainable import TrainableModel

_SLOTS = {"cpu": 16}  # rows of every forward pass: public constants
_SLOTS_OF_OTHERS = 64
_FITTING = tuple(length - 1 for length in FINE_LENGTHS)  # tokens of the longest record in each of these lengths


def feature_slots(device: torch.device) -> int:
    """Return how many rows each batch of features has."""
    return _SLOTS.get(device.type, _SLOTS_OF_OTHERS)


def feature_length(model: TrainableModel, example: Example) -> int:
    """Return the length of the batch that computes an example's feature, from the example alone; of images 1.

    Args:
        model: The model.
        example: As its collator takes it.
    """
    return _with_room(model, model.loaded.task.bucket(example, model.loaded.max_length, _FITTING))


def feature_lengths(model: TrainableModel) -> tuple[int, ...]:
    """Return every length that `feature_length` has for some example."""
    return tuple(sorted({_with_room(model, fitting) for fitting in bucket_lengths(model, _FITTING)}))


def _with_room(model: TrainableModel, fitting: int) -> int:
    """One position more than the longest example has, but for the longest of all."""
    return fitting + 1 if fitting in _FITTING and fitting < model.loaded.max_length else fitting


def feature_rows(model: TrainableModel, length: int, slots: int) -> int:
    """Return how many examples a batch of that length takes: one slot less where an example may fill its row.

    Args:
        model: The model.
        length: Of `feature_lengths`.
        slots: Rows of the batch, at least 2.
    """
    return slots if length in FINE_LENGTHS and length < model.loaded.max_length else slots - 1


def feature_batches(model: TrainableModel, examples: Sequence[Example], slots: int) -> Iterator[tuple[list[int], int]]:
    """Yield (numbers of the examples in a batch, its length), for all examples.

    Args:
        model: The model.
        examples: As its collator takes them.
        slots: Rows of a batch, at least 2.
    """
    lengths = [feature_length(model, example) for example in examples]
    return fixed_batches(range(len(examples)), lengths.__getitem__, slots, lambda length: feature_rows(model, length, slots))
