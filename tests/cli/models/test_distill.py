"""`cotune distill`, as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.console import Cotune
from tests.support.datasets import sentences, write_csv
from tests.support.exported_models import export_random

LABELS = ("bad", "good", "so")


@pytest.fixture
def teacher(base_model: Callable[[str], Path], folder: Path) -> Path:
    write_csv(folder / "public.csv", sentences(60))
    return export_random(base_model("bert"), folder / "teacher", LABELS, seed=1)


def test_a_student_is_made_and_predicts(cotune: Cotune, teacher: Path, base_model: Callable[[str], Path]) -> None:
    options = (
        "--student",
        base_model("gpt2"),
        "--data",
        "public.csv",
        "--out",
        "student",
        "--epochs",
        "1",
        "--license",
        "CC0-1.0",
    )
    shown = cotune("distill", teacher, *options)
    assert (shown.code, shown.err) == (0, "")
    assert json.loads(Path("student/distillation.json").read_text())["inputs"]["license"] == "CC0-1.0"
    [predicted] = json.loads(cotune("predict", "student", "great", "--json").out)
    assert set(predicted["scores"]) == set(LABELS)


def test_labels_are_learned_from_too(cotune: Cotune, teacher: Path, base_model: Callable[[str], Path]) -> None:
    options = ("--student", base_model("bert"), "--data", "public.csv", "--label", "label", "--out", "student", "--epochs", "1")
    found = json.loads(cotune("distill", teacher, *options, "--json").out)
    assert found["labels"] is True
    assert 0 <= found["held_out"]["student_accuracy"] <= 1


@pytest.mark.parametrize("wrong", [("--train", "all"), ("--loss", "l1"), ("--student", "no/folder"), ("--data", "no.csv")])
def test_mistakes_are_one_sentence(
    cotune: Cotune, teacher: Path, base_model: Callable[[str], Path], wrong: tuple[str, str]
) -> None:
    options = {"--student": str(base_model("bert")), "--data": "public.csv", "--out": "student"} | dict([wrong])
    shown = cotune("distill", teacher, *(word for pair in options.items() for word in pair))
    assert shown.code == 2
    assert "Traceback" not in shown.err
    assert not Path("student").exists()
