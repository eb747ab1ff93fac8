"""What decides tokens is the same however a tokenizer was saved, and another for every change that moves a token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoTokenizer

from cotune.models.base.load import LoadedModel, load_model
from cotune.models.base.tokenizer_identity import tokenizer_hash, tokenizer_parts
from cotune.models.config import ModelConfig
from cotune.models.export import export_model
from cotune.models.trainable import TrainableModel
from tests.support.chats import word_tokenizer, write_chat_model
from tests.support.language_models import language_model

__all__ = ["language_model"]  # fixtures


def loaded(folder: Path, max_length: int = 16) -> LoadedModel:
    return load_model(ModelConfig(base=str(folder), max_length=max_length), (), 0, "causal-lm")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_exported_model_has_the_tokenizer_of_its_base(language_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Though its files differ: it cuts texts at the length of its training."""
    before = loaded(language_model(kind))
    export_model(TrainableModel(before, None, 0, torch.device("cpu")), tmp_path / "model")
    exported = loaded(tmp_path / "model", 8)
    exported.reader("great day", truncation=True, max_length=2, padding="max_length")
    files = [(folder / "tokenizer.json").read_bytes() for folder in (language_model(kind), tmp_path / "model")]
    assert files[0] != files[1]
    assert tokenizer_parts(before) == tokenizer_parts(exported)
    assert len(tokenizer_hash(tokenizer_parts(before))) == 64


def edited(source: Path, folder: Path, edit: Callable[[Any], None]) -> Path:
    """The same model with a tokenizer that was changed in its file."""
    shutil.copytree(source, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    edit(document)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def swap_words(document: Any) -> None:
    words = document["model"]["vocab"]
    words["great"], words["sad"] = words["sad"], words["great"]


def fold_case(document: Any) -> None:
    document["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(("edit", "part"), [(swap_words, "vocabulary"), (fold_case, "rules")])
def test_a_change_that_moves_tokens_is_seen(
    language_model: Callable[..., Path], tmp_path: Path, edit: Callable[[Any], None], part: str
) -> None:
    plain, other = (
        tokenizer_parts(loaded(language_model())),
        tokenizer_parts(loaded(edited(language_model(), tmp_path / "m", edit))),
    )
    assert plain[part] != other[part]
    assert tokenizer_hash(plain) != tokenizer_hash(other)


def test_the_end_of_a_text_is_a_part(language_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(language_model(), tmp_path / "model")
    reader = AutoTokenizer.from_pretrained(language_model())
    reader.eos_token = "[CLS]"
    reader.save_pretrained(tmp_path / "model")
    plain, other = tokenizer_parts(loaded(language_model())), tokenizer_parts(loaded(tmp_path / "model"))
    assert [part for part in plain if plain[part] != other[part]] == ["end token"]


def test_the_chat_template_counts_for_chats_alone(tmp_path: Path) -> None:
    for name in ("first", "other"):
        write_chat_model(tmp_path / name, reader=word_tokenizer())
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    first, other = loaded(tmp_path / "first"), loaded(tmp_path / "other")
    assert tokenizer_parts(first) == tokenizer_parts(other)
    assert tokenizer_parts(first, chats=True)["chat template"] != tokenizer_parts(other, chats=True)["chat template"]


def test_a_tokenizer_in_python_is_known_by_its_files(language_model: Callable[..., Path], tmp_path: Path) -> None:
    class InPython:
        """One without a library behind it."""

        eos_token_id = 3
        truncation_side = "right"
        added_tokens_decoder: ClassVar[dict[int, str]] = {}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    found = []
    for merges in ("a b", "a b", "b a"):
        folder = tmp_path / f"model-{len(found)}"
        shutil.copytree(language_model(), folder)
        (folder / "merges.txt").write_text(merges)
        model = loaded(language_model())
        base = type(model.folder)(str(folder), folder, "")
        found.append(tokenizer_parts(LoadedModel(model.module, InPython(), base, (), 8, model.task)))
    assert found[0] == found[1]
    assert found[0]["rules"] != found[2]["rules"]
