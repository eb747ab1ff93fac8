"""Tiny decoders in files of any type, the gradients of their losses, and what autograd keeps of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.models.architecture import AlignedRows
from cotune.models.trainable import TrainableModel
from tests.support.tiny_models import VOCABULARY, tokenizer

SIZE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
TARGETS = {
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "opt": ["q_proj", "fc2"],
    "phi": ["q_proj", "fc2"],
    "phi3": ["qkv_proj", "down_proj"],
}


def write_base(folder: Path, kind: str, dtype: torch.dtype, *, tied: bool = False) -> Path:
    """Weights that bfloat16 can hold, in files of a type."""
    config = AutoConfig.for_model(kind, **SIZE, tie_word_embeddings=tied)
    for key, value in {"ffn_dim": 64, "word_embed_proj_dim": 32, "head_dim": 16}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return write_causal(folder, config, dtype)


def write_causal(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Of a configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.to(dtype).save_pretrained(folder)
    tokenizer("llama").save_pretrained(folder)
    return folder


def batch_of(model: TrainableModel) -> dict[str, Tensor]:
    samples = model.loaded.task.samples(model.loaded.reader)
    return model.loaded.task.collator(model.module, model.loaded.reader, model.device)(samples)


def gradients(model: TrainableModel, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the losses of made-up records, as a training step computes them."""
    chosen = model.train_only(names)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), AlignedRows():
        losses = model.loaded.task.losses(model.module, batch_of(model), None)
    found = torch.autograd.grad(losses.sum(), chosen)
    return {"losses": losses.detach(), **dict(zip(names, found, strict=True))}


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(tensor.dtype == torch.float32 for tensor in one.values())
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


class Watched(TorchFunctionMode):
    """Whose block knows of every weight that a linear layer computes with whether it is still in memory."""

    def __init__(self) -> None:
        self.weights: list[StorageWeakRef] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            self.weights.append(StorageWeakRef(args[1].untyped_storage()))
        return func(*args, **(kwargs or {}))
