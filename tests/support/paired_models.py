"""Tiny models of an encoder and a decoder, made from configurations, and plans that train them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.support.architectures import ending_tokenizer
from tests.support.text_tasks import PRIVATE
from tests.support.tiny_models import VOCABULARY

_SIZE = {"vocab_size": len(VOCABULARY), "d_model": 16, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3}
_STACKS = {
    **_SIZE,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 24,
    "forced_eos_token_id": None,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {**_SIZE, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "bart": _STACKS,
    "marian": _STACKS,
}
PAIRED = tuple(_CONFIGS)
_TARGETS = {"t5": ["q", "v", "wi", "wo"]}


@pytest.fixture(scope="session")
def paired_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with a tiny sequence-to-sequence model."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"paired-{kind}")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **_CONFIGS[kind])).save_pretrained(made[kind])
            ending_tokenizer().save_pretrained(made[kind])
        return made[kind]

    return make


def pairs_table(kind: str, base: Path, source: Path) -> dict[str, Any]:
    """A plan that learns something within seconds."""
    return {
        "name": "pairs",
        "task": "seq2seq",
        "train": "lora",
        "rounds": 2,
        "privacy": PRIVATE,
        "model": {"base": str(base), "max_length": 16, "precision": "float32"},
        "data": {"source": str(source), "prompt": "prompt", "target": "target"},
        "lora": {"rank": 4, "factors": "ab", "targets": _TARGETS.get(kind, ["q_proj", "v_proj", "fc1", "fc2"])},
        "local": {"learning_rate": 0.02, "optimizer": "adam", "batch_size": 0.25, "steps": 4, "physical_batch_size": 64},
        "simulation": {"clients": 2, "partition": "iid", "min_examples": 10},
    }
