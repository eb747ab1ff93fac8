"""What the layers of an encoder say of a text: means of token vectors, and the first token's vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cotune.errors import ModelError


def check_layers(config: Any, layers: tuple[int, ...]) -> None:
    """Check that an encoder has the layers. Raises ModelError."""
    count = int(getattr(config, "num_hidden_layers", 0))
    if getattr(config, "is_encoder_decoder", False) or not count:
        raise ModelError(
            f"model.feature is not supported for the architecture {config.model_type}: expected an encoder with layers, such as"
            " bert, distilbert or roberta, or model.feature = none",
            code="model.no_layers",
        )
    if max(layers) > count:
        raise ModelError(
            f"model.feature.layers names layer {max(layers)}, and the base model has {count}: expected layers from 0 (the"
            f" embeddings) to {count}, or model.feature = none",
            code="model.no_layers",
        )


def read_layers(base: nn.Module, layers: tuple[int, ...], cls: bool, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the means of the token vectors of layers, and the first token's in the last one, side by side: (b, d).

    In float32, or in float64 where the encoder computes in it. Each row is a function of its own tokens.

    Args:
        base: An encoder of transformers.
        layers: Numbers of layers; 0 is the embeddings.
        cls: Whether the first token's vector is read.
        input_ids: (b, t).
        mask: (b, t) 1 where a token counts; None: all do.
    """
    shown = torch.ones_like(input_ids) if mask is None else mask
    hidden = base(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    kind = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
    weights = (shown.to(kind) / shown.sum(dim=1, keepdim=True).clamp(min=1).to(kind))[:, :, None]
    parts = [(hidden[layer].to(kind) * weights).sum(dim=1) for layer in layers]
    return torch.cat([*parts, *([hidden[-1][:, 0].to(kind)] if cls else [])], dim=1)
