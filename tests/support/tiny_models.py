"""Tiny models of every architecture, made from configurations, with their tokenizers."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    RobertaConfig,
    ViTConfig,
)

from cotune.models.base.load import load_model
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.trainable import TrainableModel
from tests.support.datasets import FILLERS, WORDS

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(w for words in WORDS.values() for w in words), *FILLERS]
_OTHER_DEPTHS = {"shallow-bert": 1, "deep-bert": 6}
ARCHITECTURES = ("bert", "distilbert", "gpt2", "llama", "qwen2")


def config_of(kind: str) -> Any:
    size = len(VOCABULARY) if kind != "qwen2" else len(LETTERS)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "vit":
        return ViTConfig(image_size=16, patch_size=4, **small)
    if kind == "bert":
        return BertConfig(vocab_size=size, max_position_embeddings=32, pad_token_id=0, **small)
    if kind in _OTHER_DEPTHS:
        deep = {**small, "num_hidden_layers": _OTHER_DEPTHS[kind]}
        return BertConfig(vocab_size=size, max_position_embeddings=32, pad_token_id=0, **deep)
    if kind == "roberta":
        return RobertaConfig(vocab_size=size, max_position_embeddings=34, pad_token_id=0, type_vocab_size=1, **small)
    if kind == "distilbert":
        return DistilBertConfig(
            vocab_size=size, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=32, pad_token_id=0
        )
    if kind == "gpt2":
        return GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3)
    decoder = LlamaConfig if kind == "llama" else Qwen2Config
    return decoder(
        vocab_size=size,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **small,
    )


PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


LETTERS = {letter: i for i, letter in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Ġ", *string.ascii_lowercase])}


def tokenizer(kind: str = "") -> PreTrainedTokenizerFast:
    if kind == "qwen2":  # AutoTokenizer reads the folder of a qwen2 as byte-level BPE whatever its tokenizer.json says
        return Qwen2Tokenizer(vocab=LETTERS, merges=[], unk_token="[UNK]", eos_token="[SEP]", pad_token="[PAD]")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


@contextmanager
def counting(model: TrainableModel) -> Iterator[list[int]]:
    """How many texts every forward pass of the encoder had."""
    calls: list[int] = []
    encoder = model.loaded.module.base_model

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(len(args[0] if args else kwargs["input_ids"]))

    handle = encoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


LABELS = ("bad", "good", "so")
TEXTS = (
    "great",
    "the table is very sad and this is a fine day of the tree",
    "awful road",
    "it was a lovely happy day to the tree",
    "angry poor and sad",
)


def write_model(kind: str, folder: Path, config: Any = None) -> Path:
    """A pretrained encoder or decoder of that architecture, with its tokenizer or image processor. config: another than the tiny one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"add_pooling_layer": False} if kind == "vit" else {}
        AutoModel.from_config(config or config_of(kind), **options).save_pretrained(folder)
    if kind == "vit":
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    else:
        tokenizer(kind).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with a tiny pretrained encoder or decoder of that architecture."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_model(kind, tmp_path_factory.mktemp(f"tiny-{kind}"))
        return made[kind]

    return make


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return TEXTS


@pytest.fixture(scope="session")
def shared(base_model: Callable[[str], Path]) -> Callable[..., TrainableModel]:
    """(kind, lora=, seed=, pooling=, max_length=) -> a freshly loaded model with three classes on the CPU."""

    def make(
        kind: str, *, lora: LoraConfig | None = None, seed: int = 3, pooling: str = "auto", max_length: int = 32
    ) -> TrainableModel:
        config = ModelConfig.model_validate(
            {"base": str(base_model(kind)), "pooling": pooling, "max_length": max_length, "precision": "float32"}
        )
        return TrainableModel(load_model(config, LABELS, seed), lora, seed, torch.device("cpu"))

    return make


def copy_without_weights(base: Path, to: Path) -> Path:
    """The other files of a base model: what a server has that does not hold it."""
    return Path(shutil.copytree(base, to, ignore=shutil.ignore_patterns("*.safetensors")))
