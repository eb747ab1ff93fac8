"""With a frozen encoder, each record is encoded once: its feature is what the head reads, and is kept on disk.

Which vector that is (the pooled output, the first token, the last token) is not looked up in a table of architectures but found
out: the one for which the head alone gives the logits of the whole model. Of tags it is a vector for each word: that of its first
token.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from cotune.data.tasks.batching import FINE_LENGTHS, fixed_batches
from cotune.data.tasks.task import logits
from cotune.data.tasks.text import IGNORED, Batch, Example
from cotune.data.types import Input, answer_count, content_of
from cotune.errors import RunError
from cotune.models.architecture import AlignedRows, encoder_name
from cotune.models.device import bfloat16_is_fast, kernels_of
from cotune.models.probes import example_probes, lengths_of, mixes
from cotune.models.trainable import State, TrainableModel
from cotune.storage.files import atomic_write, exclusive_lock

FEATURE_SLOTS = 64  # rows of every forward pass: a public constant
_FAILURES = (AttributeError, TypeError, KeyError, RuntimeError, ValueError)
_readings: WeakKeyDictionary[TrainableModel, str | None] = WeakKeyDictionary()
_mixing: WeakKeyDictionary[TrainableModel, dict[tuple[object, ...], bool]] = WeakKeyDictionary()
Progress = Callable[[int, int], None]  # (records encoded, records in all)


def cache_folder() -> Path:
    """Where features are kept between runs: $COTUNE_CACHE, or cotune/ in the user's cache folder.

    For a user without a home, a folder of that user alone among the temporary files.
    """
    given = os.environ.get("COTUNE_CACHE")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotune"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cotune-{os.getuid()}"


class _Stub(nn.Module):
    """Stands in for the encoder: answers with the features it was given, as the hidden states of one position or of several."""

    features: Tensor

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        hidden = self.features if self.features.dim() == 3 else self.features[:, None, :]
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=cast(Any, hidden), pooler_output=cast(Any, self.features)
        )


class FeatureHead(nn.Module):
    """The head of a model alone, reading features: the architecture's own forward, with the encoder left out.

    Features are (b, d), and the scores (b, classes); a head of tags also reads (b, t, d), and gives (b, t, classes). Its
    parameters are the model's own: training one trains the other. Of any width d, each row has the scores that it has in every
    other place of a batch of that shape (see `alignment`).

    Attributes:
        reads_words: Whether a record has a vector for each of its words.
    """

    def __init__(self, model: TrainableModel) -> None:
        super().__init__()
        whole = model.loaded.module
        headed = copy.copy(whole)
        headed.__dict__["_modules"] = dict(whole._modules)
        self.stub = _Stub()
        setattr(headed, encoder_name(whole), self.stub)
        self.headed = headed
        self.task = model.loaded.task
        self.reads_words = not self.task.pools
        self.pad = int(getattr(whole.config, "pad_token_id", None) or 0)

    def forward(self, features: Tensor) -> Any:
        self.stub.features = features
        with AlignedRows():
            output = self.headed(**self.task.stand_in(features, self.pad))
        if self.reads_words and features.dim() == 2:
            output.logits = output.logits[:, 0]
        return output


def feature_head(model: TrainableModel) -> FeatureHead | None:
    """The head on features; None when it reads something else of the encoder than one vector of a record, or of each word."""
    return FeatureHead(model) if _reading(model) else None


def features_of(
    model: TrainableModel, inputs: Sequence[Input], state: State, precision: str, progress: Progress | None = None
) -> Tensor:
    """What the head reads of each input, in float32 on the CPU: (n, d), of tags n being the words of all inputs in their order.

    Read from disk where these were computed before. A row depends on its input, the model and the arithmetic alone, to the bit:
    batches are of fixed shapes (see `batching`), and with precision = auto an arithmetic that mixes rows is not used.
    The row of an input that cannot be encoded, or of a word that is cut off, is NaN. The model must be set to `state`.
    """
    reading = _reading(model)
    assert reading is not None, "feature_head said that there are none"
    dtype = arithmetic(model, precision)
    file = _file_of(model, inputs, state, reading, dtype)
    with contextlib.ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
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


def are_kept(model: TrainableModel, inputs: Sequence[Input], precision: str) -> bool:
    """Whether the features of these inputs are on disk, of the encoder as it came."""
    reading = _reading(model)
    if reading is None:
        return False
    return _read(_file_of(model, inputs, {}, reading, arithmetic(model, precision)), sum(map(answer_count, inputs))) is not None


def _file_of(model: TrainableModel, inputs: Sequence[Input], state: State, reading: str, dtype: torch.dtype) -> Path:
    """Where the features of these inputs are kept."""
    return cache_folder() / "features" / f"{_key(model, inputs, state, reading, dtype)}.safetensors"


def arithmetic(model: TrainableModel, precision: str) -> torch.dtype:
    """What features are computed in. auto: bfloat16 where it is fast and no record's feature depends on others."""
    if precision == "auto":
        fast = bfloat16_is_fast(model.device)
        return torch.bfloat16 if fast and not features_mix(model, torch.bfloat16) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def features_mix(model: TrainableModel, dtype: torch.dtype) -> bool:
    """Whether, in this arithmetic, on this device and with this many threads, a feature changes in any bit with the records
    beside it, in any shape of batch that there is. Found out once per model and machine: that they do not is kept on disk.

    Tried on the base model with random adapters, whatever state the model is in: see `independence`.
    """
    known = _mixing.setdefault(model, {})
    key = (dtype, *kernels_of(model.device))
    if key not in known:
        file = cache_folder() / "independence" / _where(model, dtype)
        known[key] = not file.exists() and _features_mix(model, dtype)
        if not known[key]:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    return known[key]


def _features_mix(model: TrainableModel, dtype: torch.dtype) -> bool:
    with model.at_random(model.adapter_names()):
        return any(
            mixes(lambda batch: [vectors_of(model, batch, dtype)], example_probes(model, length, FEATURE_SLOTS))
            for length in lengths_of(model, FINE_LENGTHS)
        )


def _where(model: TrainableModel, dtype: torch.dtype) -> str:
    """Identifies all that decides which kernels compute a feature, and in which shapes."""
    loaded = model.loaded
    parts = (
        "2",
        loaded.folder.content_hash,
        loaded.frozen,
        model.lora.model_dump_json() if model.lora else "",
        _reading(model),
        dtype,
        lengths_of(model, FINE_LENGTHS),
        FEATURE_SLOTS,
        transformers.__version__,
        kernels_of(model.device),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _key(model: TrainableModel, inputs: Sequence[Input], state: State, reading: str, dtype: torch.dtype) -> str:
    """Identifies features: the base model, what was trained in the encoder so far, how it is read, and the inputs."""
    digest = hashlib.sha256()
    loaded = model.loaded
    parts = (
        "3",
        loaded.folder.content_hash,
        transformers.__version__,  # whose tokenizers and image processors decide what the encoder gets
        str(loaded.frozen),
        reading,
        str(dtype),
        str(loaded.max_length),
        model.device.type,
    )
    digest.update("\n".join(parts).encode())
    for file in sorted(loaded.folder.path.iterdir()):  # how inputs become numbers, and numbers vectors
        if file.suffix in (".json", ".txt", ".model"):
            status = file.stat()
            digest.update(_digest_of_file(file, status.st_mtime_ns, status.st_size))
    for name in sorted(n for n in state if n.startswith(model.prefix)):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    if model.lora is not None and any(".lora_" in n for n in state):
        digest.update(f"{model.lora.model_dump_json()}{model.seed}".encode())  # a frozen A is drawn from the seed
    digest.update(_digest_of(tuple(inputs)))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _digest_of_file(file: Path, mtime_ns: int, size: int) -> bytes:
    """SHA-256 of a file of the model's folder, read once while it stays as it is: every client asks in every round."""
    return hashlib.sha256(file.read_bytes()).digest()


@lru_cache(maxsize=8)
def _digest_of(inputs: tuple[Input, ...]) -> bytes:
    """SHA-256 over all inputs; of the same ones, as every round asks for them, it is computed once."""
    digest = hashlib.sha256()
    for given in inputs:
        digest.update(hashlib.sha256(content_of(given)).digest())
    return digest.digest()


def _read(file: Path, expected: int) -> Tensor | None:
    try:
        status = file.stat()
        found = _load(file, status.st_mtime_ns, status.st_size)
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found) == expected else None


@lru_cache(maxsize=1)
def _load(file: Path, mtime_ns: int, size: int) -> Tensor:
    """The last file stays in memory: the next organization and the next round want it too. Nobody changes the tensor."""
    features: Tensor = load_file(file)["features"]
    return features


def _write(file: Path, features: Tensor) -> None:
    atomic_write(file, save({"features": features}))


def encode_batch(model: TrainableModel, examples: Sequence[Example], precision: str) -> Tensor:
    """As `features_of`, of examples as the collator takes them. Computed, not looked up."""
    return _encode(model, examples, arithmetic(model, precision), None)


def _encode(model: TrainableModel, examples: Sequence[Example], dtype: torch.dtype, progress: Progress | None) -> Tensor:
    loaded = model.loaded
    if not examples:  # of no record there are none, as wide as others
        return _encode(model, loaded.task.samples(loaded.reader), dtype, None)[:0]
    collate = loaded.task.collator(model.module, loaded.reader, model.device)
    counts = [len(example["starts"]) if "starts" in example else 1 for example in examples]
    ends = np.cumsum(counts)
    features = torch.empty(0, 0)
    done = 0

    def bucket(row: int) -> int:
        return loaded.task.bucket(examples[row], loaded.max_length, FINE_LENGTHS)

    for rows, length in fixed_batches(range(len(examples)), bucket, FEATURE_SLOTS):
        chosen = [examples[i] for i in rows]
        batch = collate(chosen, length, FEATURE_SLOTS)
        vectors = vectors_of(model, batch, dtype)[: len(rows)]
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
    loaded = model.loaded
    labels = [(0,) * len(given) if isinstance(given, tuple) else 0 for given in distinct]
    examples = loaded.task.examples(loaded.reader, loaded.max_length, distinct, labels)
    features = _encode(model, examples, dtype, progress)
    rows = dict(zip(distinct, rows_of_answers(distinct), strict=True))
    return features[[row for given in inputs for row in rows[given]]]


def rows_of_answers(inputs: Sequence[Input]) -> list[range]:
    """Where the rows of each input are among the features of all: one row, or one for each word."""
    ends = list(itertools.accumulate(map(answer_count, inputs)))
    return [range(end - answer_count(given), end) for given, end in zip(inputs, ends, strict=True)]


@torch.no_grad()
def vectors_of(model: TrainableModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """What the head reads in each row of a batch: (b, d), of tags (b, t, d) for all tokens; in float32 on the CPU."""
    reading = _reading(model)
    assert reading is not None, "feature_head said that there are none"
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return _read_vectors(model, batch, reading).float().cpu()


def _read_vectors(model: TrainableModel, batch: Batch, reading: str) -> Tensor:
    """The vector that `reading` names, in each row of a batch: (b, d); "each": of every token, (b, t, d)."""
    loaded = model.loaded
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = getattr(model.module, encoder_name(loaded.module))(**inputs)
    if reading == "pooled":
        return cast(Tensor, output.pooler_output)
    hidden = cast(Tensor, output.last_hidden_state)
    if reading == "each":
        return hidden
    if reading == "first":
        return hidden[:, 0]
    shown = inputs["input_ids"] != loaded.reader.pad_token_id  # a text may spell it: the head reads the last that is another one
    positions = torch.arange(shown.shape[1], device=shown.device)
    return hidden[torch.arange(len(shown), device=shown.device), (shown * positions).argmax(dim=1)]


def _reading(model: TrainableModel) -> str | None:
    """Which vector the head reads; found once per model by comparing logits on three made-up examples of unequal length."""
    if model not in _readings:
        _readings[model] = _find_reading(model)
    return _readings[model]


@torch.no_grad()
def _find_reading(model: TrainableModel) -> str | None:
    loaded = model.loaded
    batch = loaded.task.collator(model.module, loaded.reader, model.device)(loaded.task.samples(loaded.reader))
    try:
        expected = logits(model.module, batch)
    except _FAILURES:  # the first use of the model tells why
        return None
    head = FeatureHead(model)
    for reading in ("pooled", "first", "last") if loaded.task.pools else ("each",):
        with contextlib.suppress(*_FAILURES):
            got = head(_read_vectors(model, batch, reading).float()).logits.float()
            if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-4):
                return reading
    return None
