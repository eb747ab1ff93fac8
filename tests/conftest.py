"""Tiny models of every architecture, made from configurations, and small data sets with something to learn in them."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
import pytest
import torch
from PIL import Image
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
    ViTConfig,
)

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it; what tests start must not

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
    if kind == "vit":
        return ViTConfig(image_size=16, patch_size=4, **small)
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


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with a tiny pretrained encoder or decoder of that architecture."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"tiny-{kind}")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                options = {"add_pooling_layer": False} if kind == "vit" else {}
                AutoModel.from_config(_config(kind), **options).save_pretrained(made[kind])
            if kind == "vit":
                (made[kind] / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
            else:
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


TAGS = {"good": "B-GOOD", "bad": "B-BAD", "so": "B-SO"}
COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def tagged(count: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """(words, tags): each word has the tag of its kind, a filler has O."""
    tag_of = {word: TAGS[kind] for kind, words in WORDS.items() for word in words}
    found = [text.split() for text, _ in sentences(count, seed)]
    return [(words, [tag_of.get(word, "O") for word in words]) for words in found]


def write_tagged(path: Path, count: int = 240, seed: int = 0) -> Path:
    """JSON lines of words and tags."""
    rows = [json.dumps({"text": words, "label": tags}) for words, tags in tagged(count, seed)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_images(folder: Path, count: int = 60, seed: int = 0, classes: tuple[str, ...] = tuple(COLORS)) -> Path:
    """A folder for each color, with noisy images of unlike sizes in it, PNG and JPEG in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        color = classes[i % len(classes)]
        (folder / color).mkdir(parents=True, exist_ok=True)
        shape = (int(rng.integers(12, 30)), int(rng.integers(12, 30)), 3)
        pixels = np.clip(np.array(COLORS[color]) + rng.normal(0, 30, shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / color / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A CSV of 240 labeled sentences in three classes."""
    return write_csv(tmp_path / "reviews.csv", sentences(240))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are cached in a folder of the test session, not in the user's."""
    folder = tmp_path_factory.getbasetemp() / "cotune-cache"
    monkeypatch.setenv("COTUNE_CACHE", str(folder))
