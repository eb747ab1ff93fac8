"""A `config.json` of a stranger that says more layers, labels or experts than there is memory for, before any weight is read.

On commit b65a7559 `n_layer = 10**9` took all memory of a machine of 24 GB; on 9ad05aa2, where some names were bounded, 10⁹ extra
tokens, 10⁹ attention types in a list of lists and 150 million words of a vocabulary took 8 to 11 GB.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoConfig, AutoModel

from cotune.data.inputs.declared_counts import check_declared_counts
from cotune.models.base import bounded_parts
from cotune.models.base.finished import load_single
from cotune.models.base.gguf_folder import get_converted
from cotune.models.base.load import load_model
from cotune.models.base.lookup import find_base
from cotune.models.base.skeleton import read_weights
from cotune.models.config import ModelConfig
from tests.support.failures import fails_with
from tests.support.tiny_gguf import write_gguf

HUGE = 10**9


@pytest.fixture
def folder(base_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(base_model("bert"), tmp_path / "base")


def change(folder: Path, **said: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | said), encoding="utf-8")


GPT_NEO = {
    "model_type": "gpt_neo", "vocab_size": 26, "hidden_size": 16, "num_heads": 2, "num_layers": 2, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        {"num_hidden_layers": HUGE},
        {"num_hidden_layers": 99_999},  # of which the modules alone take a minute
        {"num_labels": HUGE},
        {"layers": [2, HUGE]},
        {"part": {"depth": HUGE}},
        {"parts": [[{"n_layers": float(HUGE)}]]},
        {**GPT_NEO, "attention_types": [[["global"], HUGE]]},
        {"vocab_size": 150_000_000},  # drawn, as the files hold another table
        {"intermediate_size": 40_000_000},
    ],
)
def test_more_than_any_model_has_is_refused(folder: Path, said: dict[str, object]) -> None:
    change(folder, **{"architectures": ["BertForSequenceClassification"], **said})
    with fails_with("model.damaged_config"):
        load_model(ModelConfig(base=str(folder)), ("a", "b"), 0, "sequence-classification")
    with fails_with("model.damaged_config"):
        load_single(str(folder))


@pytest.mark.parametrize(
    "said",
    [
        {"tokenizer_class": "ByT5Tokenizer", "extra_ids": HUGE},
        {"tokenizer_class": "PegasusTokenizer", "offset": HUGE},
        {"init_inputs": [HUGE]},
    ],
)
def test_a_tokenizer_of_a_billion_extra_tokens_is_refused(folder: Path, said: dict[str, object]) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"model_max_length": 10**30}), encoding="utf-8")
    load_model(ModelConfig(base=str(folder)), ("a", "b"), 0, "sequence-classification")
    file.write_text(json.dumps(said), encoding="utf-8")
    with fails_with("model.damaged_config"):
        load_model(ModelConfig(base=str(folder)), ("a", "b"), 0, "sequence-classification")


def test_a_gguf_file_of_a_billion_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "package").mkdir()
    with fails_with("model.damaged_config"):
        get_converted(write_gguf(tmp_path / "package" / "tiny.gguf", said_layers=HUGE))


@pytest.mark.parametrize("has_weights", [True, False])
def test_what_the_names_do_not_tell_is_counted_while_it_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, has_weights: bool
) -> None:
    """By the same code as with half a million; a small number keeps the test quick."""
    monkeypatch.setattr(bounded_parts, "_MOST_PARTS", 1000)
    found = replace(find_base(ModelConfig(base=str(folder))), has_weights=has_weights)
    read_weights(AutoModel, found, AutoConfig.from_pretrained(folder))
    change(folder, num_hidden_layers=200)
    with fails_with("model.damaged_config"):
        read_weights(AutoModel, found, AutoConfig.from_pretrained(folder))
    nn.ModuleList(nn.Identity() for _ in range(2000))  # nothing is counted outside of the block


@pytest.mark.parametrize("kind", ["bert", "gpt2", "qwen3_moe", "deepseek_v3", "swin", "t5"])
def test_configurations_of_real_models_pass(kind: str) -> None:
    check_declared_counts(json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False)))
