"""The head of a model alone, and the vector of the encoder that it reads.

Which vector that is (the pooled output, the first token, the last token) is not looked up in a table of architectures but found
out: the one for which the head alone gives the logits of the whole model. A head of tags reads a vector for each word: that of
its first token.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from cotune.data.tasks.classes import Batch, logits
from cotune.models.architecture import AlignedRows, apply_mean_layer, apply_mean_pooler, encoder_name, is_aligned
from cotune.models.features.lower_layers import LowerLayers
from cotune.models.trainable import TrainableModel

_FAILURES = (AttributeError, TypeError, KeyError, RuntimeError, ValueError)
_TRIED_ROWS = (1, 3, 16, 64)  # of a batch of made-up features
_readouts: WeakKeyDictionary[TrainableModel, str | None] = WeakKeyDictionary()
_linear: WeakKeyDictionary[TrainableModel, nn.Linear | None] = WeakKeyDictionary()


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

    A head that is one linear layer, as most are, is called by itself: what the architecture's forward does around it costs more
    than the layer.

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
        if model not in _linear:
            _linear[model] = self._find_linear()
        self.alone = [_linear[model]]  # not a part a second time

    def forward(self, features: Tensor) -> Any:
        alone = self.alone[0]
        if alone is not None and features.dim() == 2 and not alone.training:
            with contextlib.nullcontext() if is_aligned(alone) else AlignedRows():
                return _Output(alone(features))
        return self._whole(features)

    def _whole(self, features: Tensor) -> Any:
        """What the architecture makes of it."""
        self.stub.features = features
        with AlignedRows():
            output = self.headed(**self.task.stand_in(features, self.pad))
        if self.reads_words and features.dim() == 2:
            output.logits = output.logits[:, 0]
        return output

    @torch.no_grad()
    def _find_linear(self) -> nn.Linear | None:
        """The linear layer that the head is: the only one with parameters, and the same scores to the bit; None: there is none.

        Dropout would make them differ while it is on, so that the layer is called alone while it is off.
        """
        layers = [layer for layer in self.headed.modules() if any(True for _ in layer.parameters(recurse=False))]
        if len(layers) != 1 or type(layers[0]) is not nn.Linear or self.reads_words:
            return None
        layer = layers[0]
        was_training = self.headed.training
        self.headed.eval()
        try:
            for rows in _TRIED_ROWS:
                made_up = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)).to(
                    layer.weight.device
                )
                with AlignedRows():
                    if not torch.equal(layer(made_up), self._whole(made_up).logits):
                        return None
        except _FAILURES:
            return None
        finally:
            self.headed.train(was_training)
        return layer


@dataclass(frozen=True)
class _Output:
    """As that of a model of Hugging Face."""

    logits: Tensor


def feature_head(model: TrainableModel) -> FeatureHead | None:
    """The head on features; None when it reads something else of the encoder than one vector of a record, or of each word."""
    return FeatureHead(model) if get_readout(model) else None


@torch.no_grad()
def encode_vectors(model: TrainableModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """What the head reads in each row of a batch: (b, d), of tags (b, t, d) for all tokens; in float32 on the CPU.

    Args:
        model: The model.
        batch: Encoded examples on the model's device; labels are ignored.
        dtype: torch.bfloat16 for autocast; any other type computes as the model is stored.
    """
    reading = get_readout(model)
    assert reading is not None, "feature_head said that there are none"
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return _read_vectors(model, batch, reading).float().cpu()


def _read_vectors(model: TrainableModel, batch: Batch, reading: str) -> Tensor:
    """The vector that `reading` names, in each row of a batch: (b, d); "each": of every token, (b, t, d)."""
    loaded = model.loaded
    if loaded.frozen and reading in ("pooled", "first"):
        return _read_mean(model, batch, reading)
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


def _read_mean(model: TrainableModel, batch: Batch, reading: str) -> Tensor:
    """The same where the last layer is the one that stands for mean pooling: what it makes is known without computing it."""
    name, _, last = model.loaded.frozen[0].rstrip(".").rpartition(".")
    layers = cast(nn.ModuleList, model.loaded.module.get_submodule(name))
    hidden = LowerLayers(model.module, name, layers, int(last), tuples=False).read(batch)
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    vectors = apply_mean_layer(layers[int(last)], hidden, batch["attention_mask"])
    return apply_mean_pooler(vectors) if reading == "pooled" else vectors


def get_readout(model: TrainableModel) -> str | None:
    """Which vector the head reads; found once per model by comparing logits on three made-up examples of unequal length."""
    if model not in _readouts:
        _readouts[model] = _find_readout(model)
    return _readouts[model]


@torch.no_grad()
def _find_readout(model: TrainableModel) -> str | None:
    loaded = model.loaded
    if loaded.task.keeps_head or loaded.task.has_several_heads:
        return None
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
