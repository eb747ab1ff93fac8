"""Training a head on features: the encoder is frozen, and has been run over each record once.

A record of most tasks is one vector. A record with tags is a vector for each word that the model reads, and its loss is the mean
over its words, as it is where the encoder runs in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from cotune.client.training.stage_setup.training_setup import TrainingSetup, build_slot_probe
from cotune.data.inputs.batching import bucket_of_length, fixed_batches
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.task import Target
from cotune.models.encoding import FeatureRows
from cotune.models.features.head import FeatureHead
from cotune.models.physical_batch import PhysicalBatch
from cotune.models.record_independence import check_independence
from cotune.models.synthetic_batches import bucket_lengths
from cotune.models.trainable import TrainableModel
from cotune.privacy.mechanisms.per_example import Batch, Unit

_MAX_SLOTS = 512  # rows of features in a batch
_MAX_ENTRIES = 2**24  # of the gradients of a batch of features, and of the features themselves


def build_feature_setup(
    precision: str,
    model: TrainableModel,
    head: FeatureHead,
    features: FeatureRows,
    targets: Sequence[Target],
    expected_batch: float,
    units: Sequence[Unit],
    weights: Tensor | None = None,
) -> TrainingSetup:
    """Return the setup of a head that is trained on features.

    Args:
        precision: What the features were computed in (`model.precision` of a plan).
        features: Of each record, or of each word of all records.
        targets: Of each record, as `Task.encode_target` gives it.
        expected_batch: Rows of a step, a public number: it decides the shape of batches.
        units: Row numbers of each unit.
        weights: (classes,) how much a label of each class counts in the loss; None: all the same.
    """
    given = _Given(precision, model, head, expected_batch, weights)
    return (_on_words if head.reads_words else _on_vectors)(given, features, targets, units)


@dataclass(frozen=True)
class _Given:
    """What `on_features` is given and does not depend on the records."""

    precision: str
    model: TrainableModel
    head: FeatureHead
    expected_batch: float
    weights: Tensor | None

    def scores(self, batch: Batch) -> Tensor:
        return cast(Tensor, self.head(batch["features"]).logits.float())

    def loss(self, batch: Batch) -> Tensor:
        return self.model.loaded.task.losses_from_scores(self.scores(batch), batch["labels"], self.weights)

    def correct(self, batch: Batch) -> Tensor:
        return self.model.loaded.task.are_right(self.scores(batch), batch["labels"])

    def check_independent_rows(self, slots: int, width: int, lengths: Sequence[int] | None) -> None:
        """See `check_independence`."""
        per_slot = build_slot_probe(self.head, self.loss, self.scores)
        check_independence(self.model, "head", self.precision, per_slot, slots=slots, width=width, lengths=lengths)


def _on_vectors(given: _Given, features: FeatureRows, targets: Sequence[Target], units: Sequence[Unit]) -> TrainingSetup:
    task = given.model.loaded.task
    labels = torch.tensor(targets, dtype=task.label_dtype)  # of no records, too
    pool = torch.tensor([example["labels"] for example in given.model.samples], dtype=task.label_dtype)
    labels[features.unreadable] = IGNORED  # records that could not be encoded contribute nothing
    width = features.width
    slots = _slots_for(given.head, given.expected_batch)

    def batches(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Batch]]:
        for start in range(0, len(rows), slots):
            positions = range(start, min(start + slots, len(rows)))
            yield positions, filled([rows[p] for p in positions], slots)

    def filled(rows: Sequence[int], size: int) -> Batch:
        index = torch.as_tensor(rows)
        vectors = torch.empty(size, width)
        features.copy_into(vectors, index)
        vectors[len(rows) :] = 0.0
        numbers = pool.new_full((size, *pool.shape[1:]), IGNORED)
        numbers[: len(rows)] = labels[index]
        return {"features": vectors.to(given.model.device), "labels": numbers.to(given.model.device)}

    def samples() -> TrainingSetup:
        vectors = torch.linspace(-1, 1, 3 * width).reshape(3, -1)
        return _on_vectors(given, FeatureRows.of(vectors), pool.tolist(), [[0], [1], [2]])

    return TrainingSetup(
        module=given.head,
        rows=len(labels),
        units=units,
        batches=batches,
        alone=lambda row: filled([row], 1),
        loss=given.loss,
        exact=given.loss,
        correct=given.correct,
        samples=samples,
        check_independent_rows=lambda: given.check_independent_rows(slots, width, None),
        physical=PhysicalBatch(slots, given.model.device),
    )


def _on_words(given: _Given, features: FeatureRows, targets: Sequence[Target], units: Sequence[Unit]) -> TrainingSetup:
    """As `_on_vectors`, of records that have one vector for each word: batches are as long as a bucket of word counts."""
    labels = torch.tensor([number for target in targets for number in cast(tuple[int, ...], target)], dtype=torch.long)
    read = _read_words(features, targets)
    longest = given.model.loaded.max_length
    width = features.width
    slots = _slots_for(given.head, given.expected_batch, entries=longest * width)

    def batches(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Batch]]:
        bucket = [bucket_of_length(len(read[row]), longest) for row in rows]
        for positions, length in fixed_batches(range(len(rows)), bucket.__getitem__, slots):
            yield positions, filled([rows[p] for p in positions], length, slots)

    def filled(rows: Sequence[int], length: int, size: int) -> Batch:
        """The mask is for who counts positions; the head reads each by itself."""
        vectors = torch.zeros(size, length, width)
        numbers = torch.full((size, length), IGNORED)
        mask = torch.zeros(size, length, dtype=torch.long)
        for slot, row in enumerate(rows):
            words = read[row]
            features.copy_into(vectors[slot], words)
            numbers[slot, : len(words)] = labels[words]
            mask[slot, : len(words)] = 1
        batch = {"features": vectors, "labels": numbers, "attention_mask": mask}
        return {key: value.to(given.model.device) for key, value in batch.items()}

    def samples() -> TrainingSetup:
        vectors = torch.linspace(-1, 1, 6 * width).reshape(6, -1)
        return _on_words(given, FeatureRows.of(vectors), [(0, 1), (1, 0, 1), (0,)], [[0], [1], [2]])

    return TrainingSetup(
        module=given.head,
        rows=len(targets),
        units=units,
        batches=batches,
        alone=lambda row: filled([row], max(1, len(read[row])), 1),
        loss=given.loss,
        exact=given.loss,
        correct=given.correct,
        samples=samples,
        check_independent_rows=lambda: given.check_independent_rows(slots, width, bucket_lengths(given.model)),
        physical=PhysicalBatch(slots, given.model.device),
    )


def _read_words(features: FeatureRows, targets: Sequence[Target]) -> list[Tensor]:
    """Which rows of the features are the words of each record that the model has read."""
    readable = ~features.unreadable
    counts = [len(cast(tuple[int, ...], target)) for target in targets]
    return [
        end - count + readable[end - count : end].nonzero()[:, 0] for count, end in zip(counts, accumulate(counts), strict=True)
    ]


def _slots_for(head: nn.Module, expected_batch: float, entries: int = 1) -> int:
    """A power of two, for about as many rows as a step has: from public numbers alone.

    entries: Of a row's features.
    """
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    most = min(_MAX_SLOTS, max(16, _MAX_ENTRIES // max(1, trained, entries)))
    slots = 16
    while slots * 2 <= most and slots < expected_batch:
        slots *= 2
    return slots
