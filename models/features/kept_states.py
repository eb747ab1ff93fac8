"""Hidden states below the trained layers, of all records of a file: computed once, and kept on disk as features are.

They are large (2.3 kB for each token of a model of width 576): files are mapped into memory, and read where they are needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cotune.data.dataset import Dataset
from cotune.data.inputs.batching import fixed_batches
from cotune.data.record_reading import CACHED_FILES
from cotune.data.tasks.classes import Batch
from cotune.data.tasks.text import Example
from cotune.data.types import Input
from cotune.errors import RunError
from cotune.models.architecture import AlignedRows
from cotune.models.check_cache import cache_folder, is_own
from cotune.models.device import kernel_key
from cotune.models.features.cached import Progress, digest_of_encoder, get_key
from cotune.models.features.lower_layers import STATES, LowerLayers
from cotune.models.physical_batch import FEWEST_SLOTS
from cotune.models.trainable import State, TrainableModel
from cotune.storage.files import exclusive_lock

_MOST_BYTES = 2**34  # that are kept without being asked for
Encoding = Callable[[str, int, int], None]  # (the file, its records that are encoded, all of them)


@dataclass(frozen=True)
class StateReader:
    """Computes hidden states in batches of the shapes that train.

    Attributes:
        model: Set to the state in which they are wanted.
        lower: Its lower layers.
        slots: Rows of a batch, the blank one included.
        low_precision: Whether they are computed in bfloat16 where autocast says so.
    """

    model: TrainableModel
    lower: LowerLayers
    slots: int
    low_precision: bool

    def read(self, examples: Sequence[Example], progress: Progress | None = None) -> list[Tensor]:
        """Return (tokens, width) for each example."""
        found = [torch.empty(0)] * len(examples)
        for rows, states in self.batches(examples, progress):
            for row, own in zip(rows, states, strict=True):
                found[row] = own
        return found

    def batches(self, examples: Sequence[Example], progress: Progress | None = None) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yield numbers of examples with their states, each one once, in an order that follows from the examples' lengths."""
        loaded = self.model.loaded
        collate = loaded.task.collator(self.model.module, loaded.reader, self.model.device)
        done = 0
        for rows, length in self.rows_of_batches(examples):
            states = self.read_batch(collate([examples[row] for row in rows], length, self.slots)).cpu()
            yield rows, [states[slot, : len(examples[row]["input_ids"])] for slot, row in enumerate(rows)]
            done += len(rows)
            if progress:
                progress(done, len(examples))

    def rows_of_batches(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], int]]:
        """Yield the numbers of the examples of each batch, and its length."""
        loaded = self.model.loaded
        return fixed_batches(range(len(examples)), lambda row: loaded.task.bucket(examples[row], loaded.max_length), self.slots)

    def read_batch(self, batch: Batch) -> Tensor:
        """Return (slots, length, width), in the arithmetic of training."""
        with AlignedRows(), torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.low_precision):
            return self.lower.read(batch)


@dataclass(frozen=True)
class _File:
    """The states of all records of a file: those of one record are rows of `tokens`, from `starts` on."""

    inputs: Sequence[Input]
    tokens: Tensor
    starts: Sequence[int]
    counts: Sequence[int]

    def of(self, record: int) -> Tensor:
        return self.tokens[self.starts[record] : self.starts[record] + self.counts[record]]


@dataclass(frozen=True)
class KeptStates:
    """The states of the records of an organization, in their order."""

    places: Sequence[tuple[_File, int]]

    def __getitem__(self, row: int) -> Tensor:
        file, record = self.places[row]
        return file.of(record)


def attach_states(batch: Batch, states: Sequence[Tensor]) -> Batch:
    """Return a batch of tokens with the states of its first rows; those of padding and blank rows, which nobody reads, are 0."""
    slots, length = batch["input_ids"].shape
    whole = torch.zeros(slots, length, states[0].shape[-1], dtype=states[0].dtype)
    for slot, own in enumerate(states):
        whole[slot, : len(own)] = own
    return {**batch, STATES: whole.to(batch["input_ids"].device)}


def is_small(model: TrainableModel, dataset: Dataset) -> bool:
    """Whether the states of the files of an organization, or of a test set, can be kept without asking."""
    width = int(getattr(model.loaded.module.config, "hidden_size", 0))
    records = sum(len(records.inputs) for records, _ in dataset.parts)
    return 0 < records * model.loaded.max_length * width * 4 <= _MOST_BYTES


_held: WeakKeyDictionary[TrainableModel, dict[tuple[object, ...], _File]] = WeakKeyDictionary()


def get_states(reader: StateReader, dataset: Dataset, state: State, progress: Encoding | None = None) -> KeptStates:
    """Return the states of an organization's records.

    All records of a file are computed, no matter who holds them: the next one who asks finds them, in memory or on disk.

    Args:
        reader: Computes the states of the layers below the trained ones.
        dataset: The organization's records.
        state: The shared parameters.
        progress: Called with each file as its records are computed; None: no reports.
    """
    places: list[tuple[_File, int]] = []
    for records, own in dataset.parts:
        told = None if progress is None else partial(progress, records.source)
        file = _get_file(reader, records.inputs, state, told)
        places += [(file, int(record)) for record in own]
    return KeptStates(places)


def are_kept(reader: StateReader, inputs: Sequence[Input]) -> bool:
    """Return whether the states of all records of a file are on disk, of layers that nothing has trained.

    Args:
        reader: Would compute them.
        inputs: The inputs of the file's records.
    """
    place = _place(reader, inputs, {})
    try:
        return _is_whole(place.file, place.bytes)
    except OSError:
        return False


def _get_file(reader: StateReader, inputs: Sequence[Input], state: State, progress: Progress | None) -> _File:
    below = reader.lower.trained_below(state)
    held = _held.setdefault(reader.model, {})
    question = (id(inputs), digest_of_encoder(reader.model, below), reader.lower.first, reader.slots, reader.low_precision)
    if question not in held or held[question].inputs is not inputs:
        while len(held) >= CACHED_FILES:
            held.pop(next(iter(held)))
        held[question] = _find(reader, inputs, below, progress)
    return held[question]


def _find(reader: StateReader, inputs: Sequence[Input], below: State, progress: Progress | None) -> _File:
    """From the disk, or computed and kept there."""
    place = _place(reader, inputs, below)
    counts = [len(example["input_ids"]) for example in place.examples]
    order = [row for rows, _ in reader.rows_of_batches(place.examples) for row in rows]
    ends = dict(zip(order, accumulate(counts[row] for row in order), strict=True))
    starts = [ends[row] - count for row, count in enumerate(counts)]
    return _File(inputs, _read_or_write(reader, place, progress), starts, counts)


@dataclass(frozen=True)
class _Place:
    """Where the states of a file's records are kept, and in which form."""

    file: Path
    examples: Sequence[Example]
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _place(reader: StateReader, inputs: Sequence[Input], below: State) -> _Place:
    examples = reader.model.loaded.encode_unlabeled(inputs)
    made_up = reader.model.loaded.task.samples(reader.model.loaded.reader)[:1]
    (sample,) = replace(reader, slots=FEWEST_SLOTS).read(made_up)  # its form alone counts
    reading = repr((reader.lower.name, reader.lower.first, reader.slots, kernel_key(reader.model.device), _digest_of(examples)))
    file = cache_folder() / "states" / get_key(reader.model, inputs, below, reading, sample.dtype)
    return _Place(file, examples, (sum(len(example["input_ids"]) for example in examples), sample.shape[-1]), sample.dtype)


def _digest_of(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) over their tokens, which a task may cut in its own way."""
    return hashlib.sha256(repr([example["input_ids"] for example in examples]).encode()).hexdigest()


def _read_or_write(reader: StateReader, place: _Place, progress: Progress | None) -> Tensor:
    file = place.file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o700)  # that of another user is none
        with exclusive_lock(file.with_name(f"{file.name}.lock")):  # of several processes of one run, one computes
            if not _is_whole(file, place.bytes):
                _write(reader, place.examples, file, progress)
        return torch.from_file(str(file), shared=False, size=math.prod(place.shape), dtype=place.dtype).reshape(place.shape)
    except (OSError, RunError):  # nowhere to write, or no room: they are held in memory
        return torch.cat([states for _, batch in reader.batches(place.examples, progress) for states in batch])


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size and is_own(file)


def _write(reader: StateReader, examples: Sequence[Example], file: Path, progress: Progress | None) -> None:
    """In the order of batches, as there may be more than fits into memory. A file has its name once it is whole.

    Under the lock, so that what a killed process has left of the file is overwritten.
    """
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)  # with the mode that it has
    try:
        with part.open("xb") as stream:
            part.chmod(0o600)
            for _, batch in reader.batches(examples, progress):
                for states in batch:
                    stream.write(states.contiguous().view(torch.uint8).numpy().tobytes())
        part.rename(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
