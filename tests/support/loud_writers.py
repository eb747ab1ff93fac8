"""Tiny language models whose weights are so large that what they write differs from prompt to prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.data.config import TaskName
from cotune.data.types import Passage
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.trainable import TrainableModel
from tests.support.language_models import dialogs
from tests.support.tiny_models import tokenizer

CPU = torch.device("cpu")
WIDE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
OTHERS: dict[
    str, dict[str, Any]
] = {  # positions of their own, of all kinds: learned, rotary, slopes, and a state that is carried on
    "opt": {**WIDE, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
    "gpt_neox": WIDE,
    "phi": WIDE,
    "mistral": {**WIDE, "num_key_value_heads": 2},
    "gemma": {**WIDE, "num_key_value_heads": 2, "head_dim": 8},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
FOLLOWERS = {"roberta": {**WIDE, "is_decoder": True}}  # positions that begin behind the padding token's
PROMPTS = [Passage(record["prompt"] + "\n", "") for record in dialogs(24)]


def open_model(folder: Path, max_length: int = 16, task: TaskName = "causal-lm") -> TrainableModel:
    config = ModelConfig(base=str(folder), max_length=max_length, precision="float32")
    model = TrainableModel(load_model(config, (), 3, task), None, 3, CPU)
    with torch.no_grad():  # louder, so that texts differ from prompt to prompt
        for name, parameter in model.parameters():
            if "norm" not in name:
                parameter.mul_(4)
    return model


def write_other(folder: Path, kind: str) -> Path:
    reader = tokenizer("llama")
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=len(reader), **special, **{**OTHERS, **FOLLOWERS}[kind])
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder
