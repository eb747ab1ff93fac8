"""GGUF files of packages become ordinary model folders."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cotune.errors import ModelError
from cotune.models.base.gguf_folder import find_gguf, get_converted
from cotune.models.base.load import load_model
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from tests.support.tiny_gguf import CHAT_TEMPLATE, write_gguf

gguf = pytest.importorskip("gguf", reason="of the extras text-demo and dev")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    return write_gguf(tmp_path / "package" / "tiny.Q4_1.gguf")


def test_weights_are_those_of_the_file_to_the_bit(file: Path) -> None:
    weights = load_file(get_converted(file) / "model.safetensors")
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == "blk.0.ffn_gate.weight":
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert torch.equal(weights["model.layers.0.mlp.gate_proj.weight"], torch.from_numpy(np.array(expected)))
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_tokenizer_and_chat_template_come_along(file: Path) -> None:
    reader = AutoTokenizer.from_pretrained(str(get_converted(file)))
    assert reader.chat_template == CHAT_TEMPLATE
    assert reader.decode(reader("ab")["input_ids"]) == "ab"


def test_config_names_no_library(file: Path) -> None:
    text = (get_converted(file) / "config.json").read_text()
    assert "quantization_config" not in text
    assert "transformers_version" not in text


def test_a_package_with_a_gguf_file_is_a_base_model(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = file.parent.parent / "site" / "tiny_gguf_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('its code is not run')")
    file.rename(package / file.name)
    monkeypatch.syspath_prepend(str(package.parent))
    loaded = load_model(ModelConfig(base="package:tiny_gguf_package"), (), 7, "causal-lm")
    assert loaded.module.config.model_type == "llama"
    assert "tiny_gguf_package" not in sys.modules


def test_the_folder_is_made_once(file: Path) -> None:
    first = get_converted(file)
    made = first.stat().st_mtime_ns
    assert (get_converted(file), first.stat().st_mtime_ns) == (first, made)


def test_another_content_is_another_folder(file: Path) -> None:
    first = get_converted(file)
    write_gguf(file, seed=1)
    second = get_converted(file)
    assert second != first
    hashes = {find_base(ModelConfig(base=str(folder))).content_hash for folder in (first, second)}
    assert len(hashes) == 2


def test_a_folder_that_others_may_write_to_is_made_again(file: Path) -> None:
    folder = get_converted(file)
    (folder / "config.json").write_text("{}")
    folder.chmod(0o777)
    assert "llama" in (get_converted(file) / "config.json").read_text()


def test_a_damaged_file_is_one_clear_error_and_leaves_nothing(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError) as raised:
        get_converted(file)
    assert raised.value.code == "model.not_loadable"
    assert [path for path in (file.parent.parent / "cache" / "models").iterdir() if path.suffix != ".lock"] == []


def test_several_gguf_files_are_none(file: Path) -> None:
    assert find_gguf(file.parent) == file
    write_gguf(file.with_name("other.gguf"))
    assert find_gguf(file.parent) is None
