"""With a frozen encoder, each record is encoded once: its feature is what the head reads, and is kept on disk.

Which vector that is (the pooled output, the first token, the last token) is not looked up in a table of architectures but found
out: the one for which the head alone gives the logits of the whole model.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from cotune.models.device import bfloat16_is_fast
from cotune.models.durable import write_durably
from cotune.models.inputs import Input, content_of
from cotune.models.sharing import SharedModel, State
from cotune.models.tasks import Example, logits

__all__ = ["FeatureHead", "cache_folder", "encode_batch", "feature_head", "features_of"]

_BATCH = 64  # records per forward pass
_readings: WeakKeyDictionary[SharedModel, str | None] = WeakKeyDictionary()
Progress = Callable[[int, int], None]  # (records encoded, records in all)


def cache_folder() -> Path:
    """Where features are kept between runs: $COTUNE_CACHE, or cotune/ in the user's cache folder."""
    given = os.environ.get("COTUNE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotune"


class _Stub(nn.Module):
    """Stands in for the encoder: answers with the features it was given, as the hidden states of one position."""

    features: Tensor

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=cast(Any, self.features[:, None, :]), pooler_output=cast(Any, self.features)
        )


class FeatureHead(nn.Module):
    """The head of a model alone, reading features (b, d): the architecture's own forward, with the encoder left out.

    Its parameters are the model's own: training one trains the other.
    """

    def __init__(self, model: SharedModel) -> None:
        super().__init__()
        whole = model.loaded.module
        headed = copy.copy(whole)
        headed.__dict__["_modules"] = dict(whole._modules)
        self.stub = _Stub()
        setattr(headed, whole.base_model_prefix, self.stub)
        self.headed = headed
        self.task = model.loaded.task
        self.pad = int(getattr(whole.config, "pad_token_id", None) or 0)

    def forward(self, features: Tensor) -> Any:
        self.stub.features = features
        return self.headed(**self.task.stand_in(features, self.pad))


def feature_head(model: SharedModel) -> FeatureHead | None:
    """The head on features; None when no single vector of the encoder is what the head reads."""
    return FeatureHead(model) if _reading(model) else None


def features_of(
    model: SharedModel, inputs: Sequence[Input], state: State, precision: str, progress: Progress | None = None
) -> Tensor:
    """What the head reads for each input, in float32 on the CPU: (n, d). Read from disk where these were computed before.

    Computed in one canonical order and batching, so that the values depend on the inputs, the model and the arithmetic alone. The
    model must be set to `state`.
    """
    reading = _reading(model)
    assert reading is not None, "feature_head said that there are none"
    dtype = _arithmetic(precision, model.device)
    file = cache_folder() / "features" / f"{_key(model, inputs, state, reading, dtype)}.safetensors"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # several processes of one run want the same features: one computes
            found = _read(file, len(inputs))
            if found is None:
                found = _compute(model, inputs, precision, progress)
                _write(file, found)
            return found
    return _compute(model, inputs, precision, progress)  # nowhere to write: compute every time


def _arithmetic(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _key(model: SharedModel, inputs: Sequence[Input], state: State, reading: str, dtype: torch.dtype) -> str:
    """Identifies features: the base model, what was trained in the encoder so far, how it is read, and the inputs."""
    digest = hashlib.sha256()
    loaded = model.loaded
    parts = (
        "1",
        loaded.folder.content_hash,
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
    """The last file stays in memory: the next organisation and the next round want it too. Nobody changes the tensor."""
    features: Tensor = load_file(file)["features"]
    return features


def _write(file: Path, features: Tensor) -> None:
    write_durably(file, save({"features": features}))


@torch.no_grad()
def encode_batch(model: SharedModel, examples: Sequence[Example], precision: str) -> Tensor:
    """What the head reads for one batch of examples: (b, d) in float32 on the CPU. Computed, not looked up."""
    reading = _reading(model)
    assert reading is not None, "feature_head said that there are none"
    low = _arithmetic(precision, model.device) == torch.bfloat16
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=low):
        return _read_vectors(model, examples, reading).float().cpu()


def _compute(model: SharedModel, inputs: Sequence[Input], precision: str, progress: Progress | None) -> Tensor:
    distinct = list(dict.fromkeys(inputs))  # equal inputs have equal features, whatever batch they would be in
    loaded = model.loaded
    examples = loaded.task.examples(loaded.reader, loaded.max_length, distinct, [0] * len(distinct))
    order = sorted(range(len(examples)), key=lambda i: (loaded.task.order(examples[i]), i))  # like ones together: little padding
    features: Tensor | None = None
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        vectors = encode_batch(model, [examples[i] for i in rows], precision)
        if features is None:
            features = torch.empty(len(examples), vectors.shape[1])
        features[rows] = vectors
        if progress:
            progress(min(start + _BATCH, len(order)), len(order))
    if features is None:
        return torch.empty(0, 0)
    place = {given: i for i, given in enumerate(distinct)}
    return features[[place[given] for given in inputs]]


def _read_vectors(model: SharedModel, examples: Sequence[Example], reading: str) -> Tensor:
    """The vector that `reading` names, for each example: (b, d)."""
    loaded = model.loaded
    batch = loaded.task.collator(model.module, loaded.reader, model.device)(examples)
    batch.pop("labels")
    output = getattr(model.module, loaded.module.base_model_prefix)(**batch)
    if reading == "pooled":
        return cast(Tensor, output.pooler_output)
    hidden = cast(Tensor, output.last_hidden_state)
    if reading == "first":
        return hidden[:, 0]
    pad = loaded.reader.pad_token_id  # a text may spell it: the head reads the last token that is another one
    last = [max((i for i, token in enumerate(e["input_ids"]) if token != pad), default=0) for e in examples]
    return hidden[torch.arange(len(last)), torch.tensor(last)]


def _reading(model: SharedModel) -> str | None:
    """Which vector the head reads; found once per model by comparing logits on three made-up examples of unequal length."""
    if model not in _readings:
        _readings[model] = _find_reading(model) if model.loaded.task.pools else None
    return _readings[model]


@torch.no_grad()
def _find_reading(model: SharedModel) -> str | None:
    loaded = model.loaded
    examples = loaded.task.samples(loaded.reader)
    expected = logits(model.module, loaded.task.collator(model.module, loaded.reader, model.device)(examples))
    head = FeatureHead(model)
    for reading in ("pooled", "first", "last"):
        with contextlib.suppress(AttributeError, TypeError, KeyError, RuntimeError, ValueError):
            got = head(_read_vectors(model, examples, reading).float()).logits.float()
            if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-4):
                return reading
    return None
