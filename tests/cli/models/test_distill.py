"""`cotune distill`, as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests.support.console import Cotune
from tests.support.datasets import sentences, write_csv
from tests.support.exported_models import export_random, export_random_layers

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


def test_the_card_says_what_distilling_has_cost(cotune: Cotune, base_model: Callable[[str], Path], folder: Path) -> None:
    """Of the head on layers, which is exact, a plain classifier, with figures that agree with those of both on the test set."""
    export_random_layers(base_model("bert"), folder / "exact", LABELS, seed=1, whiten="none")
    write_csv(folder / "public.csv", sentences(60))
    write_csv(folder / "test.csv", sentences(40, seed=5))
    words = ("--student", "exact/encoder", "--data", "public.csv", "--out", "plain", "--epochs", "1", "--test", "test.csv")
    stated = ("--source", "drawn | words", "--license", "CC0-1.0")
    found = json.loads(cotune("distill", "exact", *words, *stated, "--json").out)
    card = Path("plain/README.md").read_text(encoding="utf-8")
    rows = dict(line[2:-2].split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and line != "| | |")
    assert "not the exact model" in card
    assert rows["public inputs"].startswith("60,")
    assert "drawn \\| words" in rows["public inputs"]
    assert "CC0-1.0" in rows["public inputs"]
    accuracy = {
        name: json.loads(cotune("evaluate", name, "--data", "test.csv", "--json").out)["accuracy"] for name in ("exact", "plain")
    }
    assert found["test"]["teacher_accuracy"] == pytest.approx(accuracy["exact"])
    assert found["test"]["student_accuracy"] == pytest.approx(accuracy["plain"])
    difference = accuracy["plain"] - accuracy["exact"]
    assert f"exact {accuracy['exact']:.3f}, this one {accuracy['plain']:.3f}: difference {difference:+.3f}" in card
    predicted = {
        name: [each["label"] for each in json.loads(cotune("predict", name, "--file", "test.csv", "--json").out)]
        for name in ("exact", "plain")
    }
    same = [ours == theirs for ours, theirs in zip(predicted["plain"], predicted["exact"], strict=True)]
    assert found["test"]["agreement"] == pytest.approx(sum(same) / len(same))
    assert AutoModelForSequenceClassification.from_pretrained("plain").config.id2label == dict(enumerate(LABELS))


def test_labels_are_learned_from_too(cotune: Cotune, teacher: Path, base_model: Callable[[str], Path]) -> None:
    options = ("--student", base_model("bert"), "--data", "public.csv", "--label", "label", "--out", "student", "--epochs", "1")
    found = json.loads(cotune("distill", teacher, *options, "--json").out)
    assert found["labels"] is True
    assert 0 <= found["held_out"]["student_accuracy"] <= 1


@pytest.mark.parametrize(
    "wrong", [("--train", "all"), ("--loss", "l1"), ("--student", "no/folder"), ("--data", "no.csv"), ("--test", "no.csv")]
)
def test_mistakes_are_one_sentence(
    cotune: Cotune, teacher: Path, base_model: Callable[[str], Path], wrong: tuple[str, str]
) -> None:
    options = {"--student": str(base_model("bert")), "--data": "public.csv", "--out": "student"} | dict([wrong])
    shown = cotune("distill", teacher, *(word for pair in options.items() for word in pair))
    assert shown.code == 2
    assert "Traceback" not in shown.err
    assert not Path("student").exists()
