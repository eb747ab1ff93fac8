"""With a frozen encoder, each record is encoded once: its feature is what the head reads, and is kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.text import Example
from cotune.data.types import Input, answer_count, content_bytes
from cotune.errors import RunError
from cotune.models.check_cache import cache_folder, is_own
from cotune.models.features.feature_batches import feature_batches, feature_slots
from cotune.models.features.head import encode_vectors, get_readout
from cotune.models.features.precision import feature_dtype
from cotune.models.trainable import State, TrainableModel
from cotune.storage.files import atomic_write, exclusive_lock

Progress = Callable[[int, int], None]  # (records encoded, records in all)


def get_features(
    model: TrainableModel, inputs: Sequence[Input], state: State, precision: str, progress: Progress | None = None
) -> Tensor:
    """What the head reads of each input, in float32 on the CPU: (n, d), of tags n being the words of all inputs in their order.

    Read from disk where these were computed before. A row depends on its input, the model and the arithmetic alone, to the bit:
    batches are of fixed shapes (see `batching`), and with precision = auto an arithmetic that mixes rows is not used.
    The row of an input that cannot be encoded, or of a word that is cut off, is NaN. The model must be set to `state`.

    The last features stay in memory: the next organization with records in the same file, and the next round, want them too.
    Nobody may change the tensor.

    Args:
        model: The model, set to `state`.
        inputs: The inputs of n records, or of records with n words in all.
        state: What was trained in the encoder so far; it is part of the key on disk.
        precision: `model.precision` of the plan: "auto", "float32" or "bfloat16".
        progress: Called as features are computed; None: no reports.

    Returns:
        A tensor (n, d), where d is the width of what the head reads.
    """
    global _last
    reading = get_readout(model)
    assert reading is not None, "feature_head said that there are none"
    dtype = feature_dtype(model, precision)
    trained = digest_of_encoder(model, state)
    if _last is None or not _last.is_of(model, inputs, trained, dtype):
        _last = None  # two large files are not held at a time
        found = _find(model, inputs, state, reading, dtype, progress)
        _last = _Held(weakref.ref(model), inputs if isinstance(inputs, tuple) else tuple(inputs), trained, dtype, found)
    return _last.features


@dataclass(frozen=True)
class _Held:
    """Features, and what they are of."""

    model: weakref.ref[TrainableModel]
    inputs: tuple[Input, ...]
    trained: bytes
    dtype: torch.dtype
    features: Tensor

    @cached_property
    def unreadable(self) -> Tensor:
        """Which rows are not of numbers alone, (n,)."""
        return self.features.isnan().any(dim=1)

    def is_of(self, model: TrainableModel, inputs: Sequence[Input], trained: bytes, dtype: torch.dtype) -> bool:
        """Whether they are of the very inputs: to compare them would take as long as to hash them."""
        return self.inputs is inputs and self.model() is model and (self.trained, self.dtype) == (trained, dtype)


_last: _Held | None = None


def find_unreadable(features: Tensor) -> Tensor:
    """Return which rows of what `get_features` gave hold NaN, (n,): looked for once while the features are kept."""
    held = _last
    return held.unreadable if held is not None and held.features is features else features.isnan().any(dim=1)


def _find(
    model: TrainableModel, inputs: Sequence[Input], state: State, reading: str, dtype: torch.dtype, progress: Progress | None
) -> Tensor:
    """The features from the disk, else computed and kept there."""
    file = _cache_file(model, inputs, state, reading, dtype)
    with contextlib.ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.parent.chmod(0o700)  # that of another user is none
            # several processes of one run want the same features: one computes
            held.enter_context(exclusive_lock(file.with_name(f"{file.name}.lock")))
        except (OSError, RunError):
            return _compute(model, inputs, dtype, progress)  # nowhere to write: compute every time
        found = _read(file, sum(map(answer_count, inputs)))
        if found is None:
            found = _compute(model, inputs, dtype, progress)
            with contextlib.suppress(OSError):  # a full disk: the next process computes them again
                _write(file, found)
        return found


def are_cached(model: TrainableModel, inputs: Sequence[Input], precision: str) -> bool:
    """Whether the features of these inputs are on disk, of the unchanged encoder.

    Args:
        model: The model.
        inputs: The inputs of the records.
        precision: As in the plan.
    """
    reading = get_readout(model)
    if reading is None:
        return False
    return (
        _read(_cache_file(model, inputs, {}, reading, feature_dtype(model, precision)), sum(map(answer_count, inputs)))
        is not None
    )


def _cache_file(model: TrainableModel, inputs: Sequence[Input], state: State, reading: str, dtype: torch.dtype) -> Path:
    """Where the features of these inputs are kept."""
    return cache_folder() / "features" / f"{get_key(model, inputs, state, reading, dtype)}.safetensors"


def get_key(model: TrainableModel, inputs: Sequence[Input], state: State, reading: str, dtype: torch.dtype) -> str:
    """Identifies features: the base model, what was trained in the encoder so far, how it is read, and the inputs.

    Args:
        model: The model.
        inputs: The inputs, in the order of the features.
        state: What was trained in the encoder so far.
        reading: Which vectors of the encoder the head reads (`get_readout`).
        dtype: Type in which the encoder computes.

    Returns:
        A SHA-256 as hex; equal keys mean equal features, to the bit.
    """
    digest = hashlib.sha256()
    loaded = model.loaded
    parts = (
        "5",
        loaded.folder.content_hash,
        transformers.__version__,  # whose tokenizers and image processors decide what the encoder gets
        str(loaded.frozen),
        reading,
        str(dtype),
        str(loaded.max_length),
        model.device.type,
        *loaded.feature,
    )
    digest.update("\n".join(parts).encode())
    for file in sorted(loaded.folder.path.iterdir()):  # how inputs become numbers, and numbers vectors
        if file.suffix in (".json", ".txt", ".model"):
            status = file.stat()
            digest.update(_digest_of_file(file, status.st_mtime_ns, status.st_size))
    digest.update(digest_of_encoder(model, state))
    digest.update(_digest_of(tuple(inputs)))
    return digest.hexdigest()


def digest_of_encoder(model: TrainableModel, state: State) -> bytes:
    """SHA-256 of what was trained in the encoder so far."""
    digest = hashlib.sha256()
    for name in sorted(n for n in state if n.startswith(model.prefix)):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    if model.lora is not None and any(".lora_" in n for n in state):
        digest.update(f"{model.lora.model_dump_json()}{model.seed}".encode())  # a frozen A is drawn from the seed
    return digest.digest()


@lru_cache(maxsize=64)
def _digest_of_file(file: Path, mtime_ns: int, size: int) -> bytes:
    """SHA-256 of a file of the model's folder, read once while it stays as it is: every client asks in every round."""
    return hashlib.sha256(file.read_bytes()).digest()


@lru_cache(maxsize=8)
def _digest_of(inputs: tuple[Input, ...]) -> bytes:
    """SHA-256 over all inputs; of the same ones, as every round asks for them, it is computed once."""
    digest = hashlib.sha256()
    for given in inputs:
        digest.update(hashlib.sha256(content_bytes(given)).digest())
    return digest.digest()


def _read(file: Path, expected: int) -> Tensor | None:
    """None where it is not there, damaged, or may have been written by another user."""
    try:
        if not is_own(file):
            return None
        found: Tensor = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found.dtype == torch.float32 and found.dim() == 2 and len(found) == expected else None


def _write(file: Path, features: Tensor) -> None:
    atomic_write(file, save({"features": features}))


def encode_batch(model: TrainableModel, examples: Sequence[Example], precision: str, slots: int | None = None) -> Tensor:
    """As `get_features`, of examples as the collator takes them. Computed, not looked up.

    Args:
        model: The model, whose encoder is used in its present state.
        examples: n encoded records.
        precision: As in the plan.
        slots: Rows of a forward pass; with others than by default, numbers are equal but for rounding.

    Returns:
        Features (n, d) in float32 on the CPU.
    """
    return _encode(model, examples, feature_dtype(model, precision), None, slots)


def _encode(
    model: TrainableModel,
    examples: Sequence[Example],
    dtype: torch.dtype,
    progress: Progress | None,
    slots: int | None = None,
) -> Tensor:
    loaded = model.loaded
    if not examples:  # of no record there are none, as wide as others
        return _encode(model, loaded.task.samples(loaded.reader), dtype, None)[:0]
    collate = loaded.task.collator(model.module, loaded.reader, model.device)
    counts = [len(example["starts"]) if "starts" in example else 1 for example in examples]
    ends = np.cumsum(counts)
    features = torch.empty(0, 0)
    done = 0
    slots = slots or feature_slots(model.device)
    for rows, length in feature_batches(model, examples, slots):
        chosen = [examples[i] for i in rows]
        batch = collate(chosen, length, slots)
        vectors = encode_vectors(model, batch, dtype)[: len(rows)]
        unlabeled = (batch["labels"][: len(rows)] == IGNORED).reshape(len(rows), -1).all(dim=1)
        vectors[unlabeled.cpu()] = torch.nan
        if not done:
            features = torch.empty(int(ends[-1]), vectors.shape[-1])
        for row, answers in zip(rows, loaded.task.answer_scores(vectors, chosen), strict=True):
            features[ends[row] - counts[row] : ends[row]] = answers
        done += len(rows)
        if progress:
            progress(done, len(examples))
    return features


def _compute(model: TrainableModel, inputs: Sequence[Input], dtype: torch.dtype, progress: Progress | None) -> Tensor:
    distinct = list(dict.fromkeys(inputs))  # equal inputs have equal features: they are computed once
    features = _encode(model, model.loaded.encode_unlabeled(distinct), dtype, progress)
    rows = dict(zip(distinct, answer_rows(distinct), strict=True))
    return features[[row for given in inputs for row in rows[given]]]


def answer_rows(inputs: Sequence[Input]) -> list[range]:
    """Where the rows of each input are among the features of all: one row, or one for each word."""
    ends = list(itertools.accumulate(map(answer_count, inputs)))
    return [range(end - answer_count(given), end) for given, end in zip(inputs, ends, strict=True)]
