"""Tiny models of architectures beyond those of the other tests, made from configurations; and their padding tokens are loud."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel

from cotune.models.base.load import load_model
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.trainable import TrainableModel
from tests.support.tiny_models import VOCABULARY, tokenizer

_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": len(VOCABULARY),
    "pad_token_id": 0,
    "max_position_embeddings": 40,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("RobertaConfig", {}),
    "albert": ("AlbertConfig", {"embedding_size": 8}),
    "fnet": ("FNetConfig", {}),
    "yoso": ("YosoConfig", {"use_expectation": True}),
    "convbert": ("ConvBertConfig", {"embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3}),
    "mobilebert": (
        "MobileBertConfig",
        {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2},
    ),
    "nystromformer": ("NystromformerConfig", {"segment_means_seq_len": 8, "num_landmarks": 4}),
    "canine": ("CanineConfig", {"num_hash_buckets": 64, "local_transformer_stride": 8}),
    "t5": ("T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "eos_token_id": 3}),
}
READ_PADDING = ("fnet", "yoso", "convbert", "mobilebert")  # with a number for how much
REFUSED = (*READ_PADDING, "nystromformer", "canine", "t5")


def folder_of(kind: str, folder: Path) -> Path:
    """A base model's folder."""
    name, own = _CONFIGS[kind]
    shared = {k: v for k, v in _SMALL.items() if kind != "t5" or k in ("vocab_size", "pad_token_id")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(getattr(transformers, name)(**shared, **own)).save_pretrained(folder)
    (ending_tokenizer() if kind == "t5" else tokenizer()).save_pretrained(folder)
    return folder


def ending_tokenizer() -> Any:
    """One that ends every text with [SEP], as those of BART and T5 do with </s>."""
    reader = tokenizer()
    end = ("[SEP]", VOCABULARY.index("[SEP]"))
    reader.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[end])
    return reader


def loaded_from(folder: Path, *, max_length: int = 32, lora: LoraConfig | None = None, **config: Any) -> TrainableModel:
    settings = ModelConfig(base=str(folder), max_length=max_length, precision="float32", **config)
    return TrainableModel(load_model(settings, ("bad", "good", "so"), 3), lora, 3, torch.device("cpu"))


Architectures = Callable[[str], TrainableModel]
