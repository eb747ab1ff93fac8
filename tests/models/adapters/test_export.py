"""Adapters by themselves: plain peft puts them on the base model, and gets what the merged model says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotune.models.base.load import load_model
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.export import ADAPTERS, export_model
from cotune.models.trainable import TrainableModel
from tests.support.language_models import language_model

__all__ = ["language_model"]  # fixtures


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft, about its own affairs
@pytest.mark.parametrize(
    ("kind", "method", "own"),
    [("llama", "rslora", False), ("gpt2", "rslora", False), ("llama", "rslora", True), ("gpt2", "lora", True)],
    ids=["llama", "gpt2", "llama with an own one", "gpt2 with an own one"],
)
def test_peft_and_transformers_load_what_is_exported(
    language_model: Callable[..., Path], tmp_path: Path, kind: str, method: Literal["lora", "rslora"], own: bool
) -> None:
    """An own adapter beside the shared one is exported with it, as one of twice the rank."""
    base = language_model(kind, tied=kind == "gpt2")
    lora = LoraConfig(rank=2, factors="ab", method=method, layers=1)
    loaded = load_model(ModelConfig(base=str(base), max_length=16, precision="float32"), (), 3, "causal-lm")
    model = TrainableModel(loaded, lora, 3, torch.device("cpu"), own_adapters=own)
    generator = torch.Generator().manual_seed(1)
    names = model.adapter_names()
    model.load({name: torch.randn(tensor.shape, generator=generator) for name, tensor in model.state(names).items()})
    export_model(model, tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("the great day", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "model" / ADAPTERS))
    with torch.no_grad():
        expected = merged(ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(ids).logits, expected, atol=1e-3)
    said = json.loads((tmp_path / "model" / ADAPTERS / "adapter_config.json").read_bytes())
    assert said["r"] == (4 if own else 2)
    assert said["base_model_name_or_path"] == base.name, "where it is on a machine is nobody's business"
    assert said["target_modules"] == sorted(said["target_modules"])
