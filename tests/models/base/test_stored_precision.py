"""Frozen weights in the 16 bits of their checkpoint: the same numbers, to the bit, as with the same weights in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from cotune.data.config import TaskName
from cotune.models.base.lookup import find_base
from cotune.models.base.stored_precision import KEPT_NARROW, NarrowLinear, find_stored_type
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.export import export_model
from cotune.models.record_independence import in_float64
from cotune.models.trainable import TrainableModel, open_model
from tests.support.frozen_weights import TARGETS, Watched, batch_of, check_equal, gradients, write_base

LORA = LoraConfig(rank=2)
Pair = Callable[..., tuple[TrainableModel, TrainableModel]]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """(kind, task, lora=, tied=) -> the same model from files in bfloat16, and from files in float32."""

    def make(kind: str, task: TaskName = "causal-lm", lora: LoraConfig | None = LORA, **more: Any) -> Any:
        labels = () if task == "causal-lm" else ("bad", "good")
        folders = [write_base(tmp_path / f"{kind}-{dtype}", kind, dtype, **more) for dtype in (torch.bfloat16, torch.float32)]
        return tuple(open_model(ModelConfig(base=str(folder), max_length=16), labels, lora, 1, "cpu", task) for folder in folders)

    return make


def narrow_names(model: TrainableModel) -> list[str]:
    return [name for name, parameter in model.parameters() if parameter.dtype == torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(KEPT_NARROW))
def test_losses_and_gradients_are_those_of_float32(pair: Pair, kind: str, dtype: torch.dtype) -> None:
    narrow, wide = pair(kind, lora=LoraConfig(rank=2, targets=TARGETS.get(kind, ["q_proj", "down_proj"])))
    assert narrow_names(narrow)
    assert not narrow_names(wide)
    with narrow.with_random_weights(narrow.adapter_names()), wide.with_random_weights(wide.adapter_names()):
        names = [name for name in narrow.adapter_names() if ".lora_B." in name]
        check_equal(gradients(narrow, names, dtype), gradients(wide, names, dtype))


@pytest.mark.parametrize("tied", [False, True])
def test_all_matrices_but_those_of_adapters_stay_narrow(pair: Pair, tied: bool) -> None:
    narrow, _ = pair("llama", tied=tied)
    matrices = [name for name, parameter in narrow.parameters() if parameter.dim() > 1 and ".lora_" not in name]
    assert narrow_names(narrow) == matrices
    assert narrow.module.get_output_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", sorted(KEPT_NARROW))
def test_tied_weights_stay_tied(pair: Pair, kind: str) -> None:
    """Gemma's table of tokens is of a class of its own, which stays wide: its head was a copy in 16 bits, trained by itself."""
    narrow, wide = pair(kind, lora=None, tied=True)
    names = wide.names("full", freeze_embeddings=False)
    assert narrow.names("full", freeze_embeddings=False) == names
    check_equal(gradients(narrow, names, torch.float32), gradients(wide, names, torch.float32))


def test_a_new_head_is_float32_and_the_same(pair: Pair) -> None:
    narrow, wide = pair("qwen2", "sequence-classification")
    names = [*narrow.names("head"), *narrow.adapter_names()]
    check_equal(narrow.state(names), wide.state(names))
    check_equal(gradients(narrow, names, torch.float32), gradients(wide, names, torch.float32))


@pytest.mark.parametrize("mode", ["full", "blocks"])
def test_what_is_trained_is_float32(pair: Pair, mode: Any) -> None:
    narrow, wide = pair("llama", lora=None)
    names = narrow.names(mode, layers=1)
    check_equal(gradients(narrow, names, torch.float32), gradients(wide, names, torch.float32))
    assert not set(names) & set(narrow_names(narrow))
    assert not any(type(layer) is NarrowLinear and layer.weight.dtype == torch.float32 for _, layer in narrow.layers)
    moved = {name: tensor + 1e-4 for name, tensor in narrow.state(names).items()}
    for model in (narrow, wide):
        model.load(moved)
    check_equal(narrow.state(names), moved)
    for model in (narrow, wide):
        model.load({})
    check_equal(narrow.state(names), wide.state(names))


def test_exported_models_are_the_same(pair: Pair, tmp_path: Path) -> None:
    files = []
    for number, model in enumerate(pair("llama")):
        with model.with_random_weights(model.adapter_names()):
            export_model(model, tmp_path / str(number))
        files.append(load_file(tmp_path / str(number) / "model.safetensors"))
    check_equal(*files)


def test_autograd_keeps_no_wide_copy_of_a_weight(pair: Pair) -> None:
    narrow, _ = pair("llama", lora=None)
    layer = next(layer for _, layer in narrow.layers if type(layer) is NarrowLinear)
    given = torch.randn(3, layer.in_features, requires_grad=True)
    with Watched() as watched:
        out = layer(given)
    assert [weight.expired() for weight in watched.weights] == [True]
    expected = functional.linear(given, layer.weight.float(), layer.bias)
    assert torch.equal(out, expected)
    slope = torch.randn_like(out)
    assert torch.equal(*(torch.autograd.grad(each, given, slope)[0] for each in (out, expected)))


@pytest.mark.parametrize("change", ["one tensor in float32", "another architecture"])
def test_other_checkpoints_are_widened(tmp_path: Path, change: str) -> None:
    folder = write_base(tmp_path / "base", "llama", torch.bfloat16)
    architecture = "llama"
    assert find_stored_type(find_base(ModelConfig(base=str(folder))), architecture) == torch.bfloat16
    if change == "another architecture":
        architecture = "t5"
    else:
        tensors = load_file(folder / "model.safetensors")
        name = next(iter(tensors))
        save_file({**tensors, name: tensors[name].float()}, folder / "model.safetensors", {"format": "pt"})
    assert find_stored_type(find_base(ModelConfig(base=str(folder))), architecture) is None


def test_in_float64_no_weight_is_narrow(pair: Pair) -> None:
    narrow, wide = pair("llama")
    found = []
    for model in (narrow, wide):
        with in_float64(model.module):
            found.append(model.module(**{key: value for key, value in batch_of(model).items() if key != "labels"}).logits)
    assert narrow_names(narrow)
    assert found[0].dtype == torch.float64
    assert torch.equal(*found)
