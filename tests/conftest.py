"""Tiny models of every architecture, made from configurations, and small data sets with something to learn in them."""

from __future__ import annotations

import csv
import os
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

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
)

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

WORDS = {
    "good": ["great", "fine", "lovely", "happy"],
    "bad": ["awful", "poor", "sad", "angry"],
    "so": ["table", "tree", "road", "day"],
}
FILLERS = ["the", "a", "is", "was", "very", "this", "it", "and", "of", "to"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(w for words in WORDS.values() for w in words), *FILLERS]
ARCHITECTURES = ("bert", "distilbert", "gpt2", "llama", "qwen2")


def _config(kind: str) -> Any:
    size = len(VOCABULARY) if kind != "qwen2" else len(LETTERS)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "bert":
        return BertConfig(vocab_size=size, max_position_embeddings=32, pad_token_id=0, **small)
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


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with a tiny pretrained encoder or decoder of that architecture."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"tiny-{kind}")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                AutoModel.from_config(_config(kind)).save_pretrained(made[kind])
            tokenizer(kind).save_pretrained(made[kind])
        return made[kind]

    return make


def sentences(count: int, seed: int = 0, classes: tuple[str, ...] = ("bad", "good", "so")) -> list[tuple[str, str]]:
    """(text, label) pairs: the label's own words among fillers, so that a small model can learn them."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        label = rng.choice(classes)
        words = [*rng.choices(WORDS[label], k=2), *rng.choices(FILLERS, k=rng.randint(1, 6))]
        rng.shuffle(words)
        found.append((" ".join(words), label))
    return found


def write_csv(path: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A CSV of 240 labelled sentences in three classes."""
    return write_csv(tmp_path / "reviews.csv", sentences(240))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are cached in a folder of the test session, not in the user's."""
    folder = tmp_path_factory.getbasetemp() / "cotune-cache"
    monkeypatch.setenv("COTUNE_CACHE", str(folder))
