from __future__ import annotations

import json
import locale
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.tokenization_utils_base import find_sentencepiece_model_file

from cotune.errors import ModelError
from cotune.models.base.folder import content_hash, is_model_file, read_base_labels, read_settings
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from tests.support.fork_server import preloaded
from tests.support.processes import forked

__all__ = ["forked"]  # fixture


@pytest.mark.parametrize("name", ["tokenizer.model", "spm.model", ".model", ".other.model"])
def test_every_vocabulary_that_transformers_finds_is_hashed(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = content_hash(tmp_path)
    (tmp_path / name).write_bytes(b"pieces")
    assert find_sentencepiece_model_file(str(tmp_path), local_files_only=True) == name
    assert is_model_file(name)
    assert content_hash(tmp_path) != before


def labels(folder: Path, names: object) -> tuple[str, ...]:
    (folder / "config.json").write_text(json.dumps({"id2label": names}), encoding="utf-8")
    return read_base_labels(folder)


def test_labels_are_in_the_order_of_the_head(tmp_path: Path) -> None:
    assert labels(tmp_path, {"0": "negative", "1": "positive"}) == ("negative", "positive")
    eleven = {str(i): f"class {i}" for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    assert labels(tmp_path, eleven) == tuple(f"class {i}" for i in range(11))
    assert labels(tmp_path, {"0": "größer", "1": "kleiner"}) == ("größer", "kleiner")


@pytest.mark.parametrize("names", [{"0": "LABEL_0", "1": "LABEL_1"}, {}, None, []])
def test_generic_names_are_none(tmp_path: Path, names: object) -> None:
    assert labels(tmp_path, names) == ()


@pytest.mark.parametrize("names", [{"bad": 0, "good": 1}, ["bad", "good"], {"0": "bad", "2": "good"}, {"1": "bad"}, "bad"])
def test_other_names_are_refused(tmp_path: Path, names: object) -> None:
    with pytest.raises(ModelError):
        labels(tmp_path, names)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b"\xef\xbb\xbf{}", b'{"a": "\xe9"}', b"[" * 100_000, None])
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError):
        read_settings(tmp_path)


def _read_by_the_locale(folder: str, answer: Connection) -> None:
    """Tell the classes, and whether the head is that of the file, where the locale has no more than ASCII."""
    locale.setlocale(locale.LC_ALL, "C")
    assert locale.getencoding().upper() in ("ASCII", "ANSI_X3.4-1968", "US-ASCII"), locale.getencoding()
    labels = read_base_labels(Path(folder))
    head = load_model(ModelConfig(base=folder), labels, 9).module.classifier.weight
    answer.send((labels, torch.equal(head, load_file(f"{folder}/model.safetensors")["classifier.weight"])))


def test_names_are_utf_8_whatever_the_locale_says(
    base_model: Callable[[str], Path], tmp_path: Path, forked: Callable[..., BaseProcess]
) -> None:
    """Read in the locale's encoding they were others, and the trained head was replaced by a new one without a word."""
    labels = ("n\u00e9gatif", "positif")
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    config = AutoConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(folder, config=config).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    told, answer = preloaded().Pipe(duplex=False)
    forked(_read_by_the_locale, str(folder), answer)
    answer.close()
    assert told.recv() == (labels, True)
