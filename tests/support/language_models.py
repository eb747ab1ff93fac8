"""Tiny language models that go on with a text, made from configurations, and records for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.datasets import FILLERS, WORDS
from tests.support.tiny_models import config_of, tokenizer


def write_language_model(folder: Path, kind: str = "llama", *, tied: bool = False) -> Path:
    """A causal language model with weights drawn from a seed, and its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config_of(kind)
        config.tie_word_embeddings = tied
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def write_louder(
    source: Path,
    folder: Path,
    *,
    factor: float = 4.0,
    dtype: torch.dtype = torch.float32,
    rows: int | None = None,
) -> Path:
    """The same model with larger weights, so that its predictions differ from token to token.

    dtype: of its files. rows: of its table of tokens, more than its tokenizer has.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.mul_(factor)
    if rows is not None:
        model.resize_token_embeddings(rows)
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(kind, tied=) -> a folder with a tiny causal language model."""
    made: dict[tuple[str, bool], Path] = {}

    def make(kind: str = "llama", *, tied: bool = False) -> Path:
        if (kind, tied) not in made:
            made[kind, tied] = write_language_model(tmp_path_factory.mktemp(f"lm-{kind}"), kind, tied=tied)
        return made[kind, tied]

    return make


def dialogs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of a few words, and targets that repeat the one of them that means something."""
    rng = random.Random(seed)
    meant = [word for words in WORDS.values() for word in words]
    found = []
    for _ in range(count):
        word = rng.choice(meant)
        fillers = [rng.choice(FILLERS) for _ in range(rng.randint(1, 4))]
        found.append({"prompt": " ".join([*fillers, word]), "target": " ".join([word, *fillers[:2]])})
    return found


def write_dialogs(file: Path, count: int = 200, seed: int = 0) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in dialogs(count, seed)), encoding="utf-8")
    return file
