"""`cotune predict` and `evaluate` with a language model, against transformers' own generation and loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.console import Cotune, _logging_as_it_was, cotune, folder
from tests.support.language_models import dialogs, language_model, write_dialogs

__all__ = ["_logging_as_it_was", "cotune", "folder", "language_model"]  # fixtures


@pytest.fixture
def model(language_model: Callable[..., Path]) -> str:
    return str(language_model("llama"))


def test_texts_are_those_of_transformers(model: str, cotune: Cotune) -> None:
    found = json.loads(cotune("predict", model, "great day", " ", "--max-new-tokens", "5", "--json").out)
    reader = AutoTokenizer.from_pretrained(model)
    ids = reader("great day\n", return_tensors="pt").input_ids
    generated = AutoModelForCausalLM.from_pretrained(model).generate(ids, max_new_tokens=5, do_sample=False)
    expected = reader.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert [each["text"] for each in found] == [expected, None]
    assert found[1]["reason"] == "blank prompt"


def test_a_file_of_prompts_has_a_text_for_each_row(model: str, cotune: Cotune, folder: Path) -> None:
    write_dialogs(folder / "new.jsonl", 6)
    out = folder / "generated.csv"
    call = ("predict", model, "--file", str(folder / "new.jsonl"), "--text", "prompt", "--max-new-tokens", "2")
    assert cotune(*call, "--out", str(out)).code == 0
    header, *rows = out.read_text(encoding="utf-8").splitlines()
    assert header == "row,input,text,reason"
    assert len(rows) == 6


def test_the_loss_is_that_of_transformers_over_all_target_tokens(model: str, cotune: Cotune, folder: Path) -> None:
    data = write_dialogs(folder / "labeled.jsonl", 20)
    call = ("evaluate", model, "--data", str(data), "--prompt", "prompt", "--target", "target", "--json")
    figures = json.loads(cotune(*call).out)["figures"]
    reader = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    losses, tokens = 0.0, 0
    for record in dialogs(20):
        prompt = reader(record["prompt"] + "\n").input_ids
        prompt = prompt[:-1] if prompt[-1] == reader.eos_token_id else prompt
        target = [*reader(record["target"], add_special_tokens=False).input_ids, reader.eos_token_id]
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(prompt) + target])
            losses += float(base(torch.tensor([prompt + target]), labels=labels).loss) * len(target)
        tokens += len(target)
    assert figures["loss"] == pytest.approx(losses / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-4)
    low, high = figures["loss_interval"]
    assert low <= figures["loss"] <= high
    assert "loss" in cotune(*call[:-1]).out


def test_a_threshold_is_for_classes(model: str, cotune: Cotune) -> None:
    found = cotune("predict", model, "great", "--threshold", "good=0.3", "--json")
    assert json.loads(found.out)["error"]["code"] == "model.no_classifier"
