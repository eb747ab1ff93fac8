from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cotune.errors import PrivacyError
from cotune.models import record_independence
from cotune.models.base.load import load_model
from cotune.models.check_cache import model_key, read_check, write_check
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.record_independence import check_padding
from cotune.models.trainable import TrainableModel

KEY = ("model", 1, ("a", None), torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entry(cache: Path) -> Path:
    (file,) = cache.rglob("*.json")
    return file


def test_result_is_found_under_its_key_alone() -> None:
    write_check("padding", KEY, 2.5e-7)
    assert read_check("padding", KEY) == 2.5e-7
    assert read_check("gradients", KEY) is None
    for number in range(len(KEY)):
        assert read_check("padding", (*KEY[:number], "other", *KEY[number + 1 :])) is None
    assert read_check("padding", KEY[:-1]) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"format": 1, "result": 0.0}'])
def test_damaged_entry_is_none(cache: Path, content: bytes) -> None:
    write_check("padding", KEY, 0.0)
    entry(cache).write_bytes(content)
    assert read_check("padding", KEY) is None


@pytest.mark.parametrize("change", [{"key": "another"}, {"format": 0}, {"result": "NaN"}, {"result": None}, {"result": [1]}])
def test_entry_of_another_check_is_none(cache: Path, change: dict[str, object]) -> None:
    write_check("padding", KEY, 0.0)
    file = entry(cache)
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **change}))
    assert read_check("padding", KEY) is None


@pytest.mark.parametrize("what", ["file", "folder"])
def test_entry_that_others_may_write_is_none(cache: Path, what: str) -> None:
    write_check("padding", KEY, 0.0)
    path = entry(cache) if what == "file" else entry(cache).parent
    path.chmod(path.stat().st_mode | 0o002)
    assert read_check("padding", KEY) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_entry_of_another_user_is_none(cache: Path) -> None:
    write_check("padding", KEY, 0.0)
    os.chown(entry(cache), 12345, -1)
    assert read_check("padding", KEY) is None


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "file" / "cache"))
    write_check("padding", KEY, 0.0)
    assert read_check("padding", KEY) is None


def make(folder: Path, seed: int = 1, classes: int = 2, lora: LoraConfig | None = None) -> TrainableModel:
    labels = tuple(f"class {number}" for number in range(classes))
    return TrainableModel(load_model(ModelConfig(base=str(folder)), labels, seed), lora, seed, torch.device("cpu"))


def test_key_of_a_model_holds_what_its_numbers_follow_from(base_model: Callable[[str], Path]) -> None:
    bert = base_model("bert")
    models = [make(bert), make(bert, 2), make(bert, 1, 3), make(bert, 1, 2, LoraConfig(rank=2)), make(base_model("distilbert"))]
    keys = [repr(model_key(model)) for model in models]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        keys.append(repr(model_key(models[0])))
    finally:
        torch.set_num_threads(before)
    assert len(set(keys)) == len(keys)
    assert repr(model_key(make(bert))) == keys[0]


def test_padding_is_tried_once_for_a_model(base_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process makes a model of its own, which it need not try again."""
    tried: list[int] = []
    measure = record_independence.padding_error
    monkeypatch.setattr(record_independence, "padding_error", lambda *given: (tried.append(1), measure(*given))[1])
    for _ in range(2):
        check_padding(make(base_model("bert")))
    assert len(tried) == 1
    check_padding(make(base_model("bert"), 2))
    assert len(tried) == 2


def test_failed_check_is_made_again(base_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(record_independence, "padding_error", lambda *_: 1.0)
    with pytest.raises(PrivacyError):
        check_padding(make(base_model("bert")))
    assert not list(cache.rglob("*.json"))
