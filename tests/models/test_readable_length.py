"""What a model can read is found when it is loaded, and whatever is within it can be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel

from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from tests.support.failures import fails_with
from tests.support.tiny_models import VOCABULARY, tokenizer

SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
WITH_POSITIONS: dict[str, dict[str, Any]] = {
    "BertConfig": SMALL,
    "RobertaConfig": SMALL | {"pad_token_id": 1},
    "XLMRobertaConfig": SMALL | {"pad_token_id": 3},
    "MPNetConfig": SMALL | {"pad_token_id": 1},
    "ElectraConfig": SMALL | {"embedding_size": 8},
}


def made(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    reader = tokenizer()
    if config.pad_token_id:
        reader.pad_token = VOCABULARY[config.pad_token_id]
    reader.save_pretrained(folder)
    return folder


def loaded(folder: Path, max_length: int = 64) -> Any:
    return load_model(ModelConfig(base=str(folder), max_length=max_length), ("bad", "good"), 1)


def accepts(model: Any, length: int) -> bool:
    """Oracle: the whole model is run on a row of so many tokens."""
    ids = torch.full((1, length), 5)
    try:
        model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_the_longest_row_is_the_longest_that_the_model_takes(tmp_path: Path, name: str) -> None:
    """RoBERTa has max_position_embeddings - pad - 1 positions; a text of more tokens ended training where it was held."""
    config = getattr(transformers, name)(**WITH_POSITIONS[name], max_position_embeddings=24)
    model = loaded(made(tmp_path / "base", config))
    assert accepts(model, model.max_length)
    assert not accepts(model, model.max_length + 1)
    shorter = loaded(tmp_path / "base", max_length=9)
    assert shorter.max_length == 9


def test_minus_one_is_no_bound(tmp_path: Path) -> None:
    """XLNet."""
    size = len(VOCABULARY)
    config = transformers.XLNetConfig(vocab_size=size, d_model=16, n_layer=1, n_head=2, d_inner=32, pad_token_id=0)
    assert loaded(made(tmp_path / "base", config), max_length=50).max_length == 50


def test_the_bound_of_what_attention_adds_by_distance(tmp_path: Path) -> None:
    """MPT, which has no table of positions: a longer row fails within its layers."""
    config = transformers.MptConfig(vocab_size=len(VOCABULARY), d_model=16, n_heads=2, n_layers=1, max_seq_len=24)
    model = loaded(made(tmp_path / "base", config))
    assert model.max_length == 24
    assert accepts(model, 24)
    assert not accepts(model, 25)


@pytest.mark.parametrize("name", ["FalconConfig", "BloomConfig"])
def test_distances_without_a_bound(tmp_path: Path, name: str) -> None:
    """Rotary positions, and ALiBi."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, name)(vocab_size=len(VOCABULARY), pad_token_id=0, **size)
    assert loaded(made(tmp_path / "base", config), max_length=300).max_length == 300


@pytest.fixture
def folder(base_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_model("bert"), tmp_path / "base"))


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def framed(number: int) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [number], "tokens": ["[CLS]"]}},
    }


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a word": lambda content: content["model"]["vocab"].update(newdrug=len(VOCABULARY)),
    "a far word": lambda content: content["model"]["vocab"].update(newdrug=10**6),
    "an added token": lambda content: content["added_tokens"].append(
        {
            "id": len(VOCABULARY),
            "content": "newdrug",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
            "special": False,
        }
    ),
    "a frame": lambda content: content.update(post_processor=framed(len(VOCABULARY))),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_token_beyond_the_table_is_refused(folder: Path, kind: str) -> None:
    loaded(folder)
    edit_tokenizer(folder, SPOILED[kind])
    with fails_with("model.unusable_tokenizer", "26"):
        loaded(folder)


def test_a_padding_token_beyond_the_table_is_refused(folder: Path) -> None:
    reader = tokenizer()
    reader.add_special_tokens({"pad_token": "[MORE]"})
    reader.save_pretrained(folder)
    with fails_with("model.unusable_tokenizer", "resize_token_embeddings"):
        loaded(folder)


def test_an_embedding_table_may_have_more_rows(folder: Path) -> None:
    edit_tokenizer(folder, lambda content: content["model"]["vocab"].pop("of"))
    assert loaded(folder).module.get_input_embeddings().weight.shape[0] == len(VOCABULARY)
