"""Activation checkpointing: layers keep their inputs alone, and compute the rest again in the backward pass.

Memory for the activations of one layer in place of those of all, for a second forward pass (Chen et al., 2016,
https://arxiv.org/abs/1604.06174). What is computed is the same, to the bit. The switch of transformers asks for modules in
training mode, in which some draw random numbers; this one does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from cotune.models.architecture import AlignedRows
from cotune.models.base.quantized_layers import count_parameters

Checkpointing = Literal["auto", "on", "off"]
_MANY_PARAMETERS = 1e9


def is_checkpointed(wanted: Checkpointing, module: nn.Module) -> bool:
    """Whether activations are computed again: with "auto" for a model of a billion parameters and more."""
    return wanted == "on" or (wanted == "auto" and count_parameters(module) >= _MANY_PARAMETERS)


@contextmanager
def checkpointing(module: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Let forward passes inside the block, which run under `AlignedRows`, keep only the inputs of a model's layers.

    Args:
        module: A model of transformers. One whose layers do not support it is left as it is.
        enabled: False leaves it as it is, too.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)] if enabled else []
    config: Any = getattr(module, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=_contexts)
        if layers and cached:
            config.use_cache = False  # a layer that runs twice would fill it twice
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        if layers and cached:
            config.use_cache = cached


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around the forward pass, and around its repetition, which comes when the block is over."""
    return nullcontext(), AlignedRows()
