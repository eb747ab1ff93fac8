"""Language models together: against plain transformers, one record at a time, and what weights are fitted on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotune.data.records import Records
from cotune.data.types import Passage
from cotune.ensembles.fusion import assign_folds
from cotune.ensembles.text_fusion import FOLDS, fit_text_weights, measure_text_fusion
from cotune.errors import CotuneError
from cotune.models.evaluation.language_model import evaluate_language_model, open_language_model
from tests.support.language_models import dialogs, language_model, write_louder

__all__ = ["language_model"]  # fixtures

RECORDS = [Passage(record["prompt"] + "\n", record["target"]) for record in dialogs(23)]


def measured(folders: list[Path], method: Any = "average", records: list[Passage] | None = None, **more: Any) -> dict[str, Any]:
    given = RECORDS if records is None else records
    opened = [open_language_model(str(folder), "causal-lm", "cpu", 16) for folder in folders]
    held = Records(tuple(given), ("",) * len(given), "held", **more)
    return measure_text_fusion(method, opened, [str(folder) for folder in folders], held)


def logs_by_hand(folder: Path, size: int) -> list[np.ndarray[Any, Any]]:
    """Of the target tokens of each record."""
    reader, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for record in RECORDS:
        prompt = reader(record.prompt).input_ids
        target = [*reader(record.target, add_special_tokens=False).input_ids, reader.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1, :size].double()
        found.append(torch.log_softmax(scores, dim=1).gather(1, torch.tensor(target)[:, None])[:, 0].numpy())
    return found


@pytest.fixture
def folders(language_model: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Unlike models, one of them with a padded table."""
    return [
        write_louder(language_model(), tmp_path / "first", factor=3, rows=64),
        write_louder(language_model("gpt2"), tmp_path / "second"),
    ]


def test_the_average_is_that_of_probabilities(folders: list[Path]) -> None:
    size = AutoModelForCausalLM.from_pretrained(folders[1]).config.vocab_size
    logs = [np.concatenate(logs_by_hand(folder, size)) for folder in folders]
    found = measured(folders)
    for model, each in zip(found["models"], logs, strict=True):
        assert model["loss"] == pytest.approx(-each.mean(), rel=1e-5)
    assert found["fused"]["loss"] == pytest.approx(-np.log((np.exp(logs[0]) + np.exp(logs[1])) / 2).mean(), rel=1e-5)
    assert found["fused"]["weights"] == [0.5, 0.5]


def test_weights_are_measured_on_other_records(folders: list[Path]) -> None:
    """Recomputed for each fold by a search over the simplex."""
    size = AutoModelForCausalLM.from_pretrained(folders[1]).config.vocab_size
    of_records = list(zip(*(logs_by_hand(folder, size) for folder in folders), strict=True))
    fold = assign_folds(np.zeros(len(RECORDS), dtype=np.int64), FOLDS, 0)
    losses = []
    for number in range(FOLDS):
        fitted = np.concatenate([np.exp(pair) for row, pair in enumerate(of_records) if fold[row] != number], axis=1)
        grid = np.linspace(0, 1, 4001)[:, None]
        likelihood = np.log(grid * fitted[0] + (1 - grid) * fitted[1] + 1e-300).mean(axis=1)
        best = float(grid[likelihood.argmax(), 0])
        losses += [
            -np.log(best * np.exp(pair[0]) + (1 - best) * np.exp(pair[1]))
            for row, pair in enumerate(of_records)
            if fold[row] == number
        ]
    found = measured(folders, "weighted")
    assert found["fused"]["loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-3)
    assert sum(found["fused"]["weights"]) == pytest.approx(1)
    assert min(found["fused"]["weights"]) >= 0


def test_a_useless_model_gets_no_weight(language_model: Callable[..., Path], tmp_path: Path) -> None:
    useless = write_louder(language_model(), tmp_path / "useless", factor=40)
    found = measured([useless, language_model()], "weighted")
    assert found["fused"]["weights"][0] < 0.05
    assert found["fused"]["loss"] < measured([useless, language_model()])["fused"]["loss"]


def test_a_model_beside_itself_is_that_model(language_model: Callable[..., Path]) -> None:
    found = measured([language_model(), language_model()], "weighted")
    opened = open_language_model(str(language_model()), "causal-lm", "cpu", 16)
    alone = evaluate_language_model(opened, Records(tuple(RECORDS), ("",) * len(RECORDS), "held"))["figures"]
    assert found["fused"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert found["fused"]["loss_interval"] == pytest.approx(alone["loss_interval"], rel=1e-6)
    assert found["against_best"]["better"] not in ("yes", "no")


@pytest.mark.parametrize("steps", [1, 3])
def test_fitted_weights_are_on_the_simplex(steps: int) -> None:
    logs = -np.random.default_rng(steps).exponential(2.0, (steps + 1, 50))
    weights = fit_text_weights("weighted", logs)
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0


def test_records_of_a_unit_are_in_one_fold(folders: list[Path]) -> None:
    """With as many units as folds, each is left out once; with fewer there is nothing to test on."""
    assert measured(folders, "weighted", units=tuple(str(row % 5) for row in range(len(RECORDS))))["records"] == 23
    with pytest.raises(CotuneError) as caught:
        measured(folders, "weighted", units=tuple(str(row % 4) for row in range(len(RECORDS))))
    assert caught.value.code == "data.too_few_records"


def test_what_cannot_be_compared_is_refused(language_model: Callable[..., Path]) -> None:
    long = [Passage("great " * 40, "sad")] * 30
    for given, records, code in (
        ([language_model(), language_model("qwen2")], RECORDS, "model.other_tokenizer"),
        ([language_model()] * 2, long, "data.no_targets"),
        ([language_model()] * 2, [], "data.no_targets"),
        ([language_model()] * 2, RECORDS[:4], "data.too_few_records"),
    ):
        with pytest.raises(CotuneError) as caught:
            measured(given, "weighted", records)
        assert caught.value.code == code
    assert measured([language_model()] * 2, "average", [*RECORDS, *long])["not_predicted"] == 30
