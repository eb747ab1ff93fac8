from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftType
from pydantic import ValidationError

from cotune.models.adapters.lora import merge_adapters
from cotune.models.config import _WHY_NOT, LoraConfig
from cotune.models.trainable import TrainableModel
from tests.support.failures import fails_with
from tests.support.tiny_models import ARCHITECTURES

Make = Callable[..., TrainableModel]


def adapted(model: TrainableModel) -> list[str]:
    return [name.split(".lora_B")[0] for name, _ in model.parameters() if ".lora_B." in name]


@pytest.mark.parametrize(("method", "scale"), [("lora", 6 / 4), ("rslora", 6 / math.sqrt(4))])
def test_the_scale_of_each_method(shared: Make, method: Any, scale: float) -> None:
    """W + s·B·A, against the merged weight: s = α/r, or α/√r (Kalajdzievski 2023)."""
    model = shared("bert", lora=LoraConfig(method=method, rank=4, alpha=6))
    layer = "bert.encoder.layer.0.attention.self.value"
    b = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    model.load({f"{layer}.lora_B.default.weight": b})
    state = model.state(name for name, _ in model.parameters())
    merged: Any = copy.deepcopy(model.loaded.module)
    merge_adapters(merged)
    expected = state[f"{layer}.weight"] + scale * b @ state[f"{layer}.lora_A.default.weight"]
    torch.testing.assert_close(merged.get_parameter(f"{layer}.weight"), expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_only_the_last_layers(shared: Make, kind: str) -> None:
    everywhere = adapted(shared(kind, lora=LoraConfig(rank=2)))
    assert adapted(shared(kind, lora=LoraConfig(rank=2, layers=2))) == everywhere
    last = adapted(shared(kind, lora=LoraConfig(rank=2, layers=1)))
    assert last == [name for name in everywhere if ".1." in name]
    assert 0 < len(last) < len(everywhere)


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_more_layers_than_there_are(shared: Make, pooling: str) -> None:
    """The layer that does the mean pooling is none of them."""
    with fails_with("model.lora_layers", "3", "2", "2"):
        shared("bert", lora=LoraConfig(rank=2, layers=3), pooling=pooling)


@pytest.mark.parametrize(
    ("kind", "target"), [("bert", "word_embeddings"), ("gpt2", "wte"), ("llama", "embed_tokens"), ("bert", "position_embeddings")]
)
def test_embeddings_are_no_targets(shared: Make, kind: str, target: str) -> None:
    with fails_with("model.lora_targets", target):
        shared(kind, lora=LoraConfig(targets=(target,)))


@pytest.mark.parametrize("method", sorted(_WHY_NOT))
@pytest.mark.parametrize("spelling", [str.lower, str.upper, lambda name: name.replace("_", "-")])
def test_known_but_unsupported_model_is_refused_with_reason(method: str, spelling: Callable[[str], str]) -> None:
    with pytest.raises(ValidationError, match="expected lora or rslora: ") as caught:
        LoraConfig.model_validate({"method": spelling(method)})
    assert _WHY_NOT[method] in str(caught.value)


def test_the_well_known_methods_of_peft_are_known() -> None:
    assert {"dora", "ia3", "adalora", "vera", "prompt_tuning", "prefix_tuning", "p_tuning", "loha", "lokr", "oft"} <= set(
        _WHY_NOT
    )
    of_peft = {kind.value.lower() for kind in PeftType}
    assert set(_WHY_NOT) - of_peft == {"dora", "prompt"}  # the one is an option of lora there, the other a short name


def test_the_plan_says_which_method_was_meant() -> None:
    assert json.loads(LoraConfig().model_dump_json())["method"] == "lora"
