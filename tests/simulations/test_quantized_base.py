"""A run on a base model in 4 bits, from the plan to predictions of the model that comes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cotune.errors import PlanError
from cotune.models.base.lookup import find_base
from cotune.models.base.quantized_layers import QuantizedLinear, check_bitsandbytes
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.run import Run, simulate
from tests.support.console import Cotune as CommandLine
from tests.support.console import _logging_as_it_was, folder
from tests.support.console import cotune as command_line
from tests.support.failures import fails_with
from tests.support.simulations import TOY_MODEL, NewPlan

__all__ = ["_logging_as_it_was", "command_line", "folder"]  # fixtures
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0}
QUANTIZED = {**TOY_MODEL, "quantization": "nf4"}
ADAPTERS: dict[str, Any] = {
    "train": "lora",
    "lora": {"rank": 2},
    "local": {"learning_rate": 0.5, "momentum": 0.0, "steps": 3},
    "rounds": 2,
    "privacy": PRIVATE,
}


@pytest.fixture(scope="module")
def run(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = toy_plan("llama", model=QUANTIZED, **ADAPTERS)
    return simulate(plan, tmp_path_factory.mktemp("quantized") / "run", device="cpu")


def test_result_computes_what_was_trained(run: Run, command_line: CommandLine, toy_data: Path) -> None:
    """The exported model is plain, and says what the trained one says."""
    files = RunFolder(run.folder)
    plan = files.plan
    model = get_plan_model(plan, "cpu")
    assert sum(isinstance(layer, QuantizedLinear) for _, layer in model.layers) == 14
    state = files.load().state
    assert state
    assert all(".lora_" in name or not name.startswith(model.prefix) for name in state)
    model.load(state)
    plain = AutoModelForSequenceClassification.from_pretrained(run.folder / "model")
    batch = AutoTokenizer.from_pretrained(run.folder / "model")("the great day", return_tensors="pt")
    asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(plain(**asked).logits, model.module(**asked).logits, rtol=1e-4, atol=1e-5)
    told = json.loads(command_line("predict", str(run.folder / "model"), "the great day", "--json").out)
    scores = dict(zip(plan.labels, plain(**asked).logits[0].softmax(0).tolist(), strict=True))
    assert told[0]["scores"] == pytest.approx(scores, abs=1e-4)
    found = json.loads(command_line("evaluate", str(run.folder / "model"), "--data", str(toy_data), "--json").out)
    assert 0 <= found["accuracy"] <= 1


def test_plan_and_card_name_the_settings(run: Run) -> None:
    plan = RunFolder(run.folder).plan
    assert plan.model.base_hash == find_base(plan.model).content_hash
    full = plan.model.model_copy(update={"quantization": "none", "base_hash": None})
    assert plan.model.base_hash != find_base(full).content_hash
    card = (run.folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "in 4 bits (nf4)" in card


def test_heads_are_trained_on_a_base_in_four_bits(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Features are kept under the base's hash: those of the full model are others."""
    runs = [
        simulate(toy_plan("bert", rounds=1, privacy=PRIVATE, model=model), tmp_path / str(number), device="cpu")
        for number, model in enumerate((QUANTIZED, TOY_MODEL))
    ]
    states = [RunFolder(each.folder).load().state for each in runs]
    assert states[0].keys() == states[1].keys()
    assert all("classifier" in name for name in states[0])


def test_nothing_is_charged_without_bitsandbytes(toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    plan = toy_plan("llama", model=QUANTIZED, seed=11, **ADAPTERS)
    with fails_with("model.no_bitsandbytes", "cotune[qlora]"):
        simulate(plan, tmp_path / "run", device="cpu")
    assert list(tmp_path.rglob("ledger*")) == []
    check_bitsandbytes.cache_clear()


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"train": "full"}, ("train", "full", "model.quantization")),
        ({"train": "blocks", "layers": 1}, ("train", "blocks", "model.quantization")),
        ({"train": "lora", "strategy": "fedex", "lora": {"rank": 2, "factors": "ab"}}, ("fedex", "model.quantization")),
        ({"train": "lora", "strategy": "flora", "lora": {"rank": 2, "factors": "ab"}}, ("flora", "model.quantization")),
        ({"train": "head", "model": {"feature": {"layers": [1]}, **QUANTIZED}}, ("quantization", "nf4", "model.feature")),
    ],
    ids=["full", "blocks", "fedex", "flora", "feature"],
)
def test_what_would_change_four_bits_is_refused(toy_plan: NewPlan, changes: dict[str, Any], values: tuple[str, ...]) -> None:
    with fails_with("plan.invalid", *values) as caught:
        toy_plan("llama", **{"model": QUANTIZED, **changes})
    assert isinstance(caught.value, PlanError)
