"""`cotune distill`, as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from cotune.cli.models.distilled_texts import distill_texts, find_task
from cotune.cli.options import RecordOptions
from cotune.ensembles.config import DistillationConfig
from cotune.errors import CotuneError
from cotune.models.config import ModelConfig
from tests.support.chats import chats
from tests.support.console import Cotune
from tests.support.datasets import sentences, write_csv
from tests.support.exported_models import export_random, export_random_layers
from tests.support.language_models import dialogs, language_model

__all__ = ["language_model"]  # fixture

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


@pytest.fixture
def writer(language_model: Callable[..., Path], folder: Path) -> Path:
    rows = [{**record, "messages": chat} for record, chat in zip(dialogs(60), chats(60), strict=True)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return language_model("llama")


def test_a_language_model_is_distilled(cotune: Cotune, writer: Path, language_model: Callable[..., Path]) -> None:
    options = ("--data", "prompts.jsonl", "--prompt", "prompt", "--target", "target", "--out", "student", "--epochs", "1")
    more = ("--license", "CC0-1.0", "--teacher-weights", "3,1")
    shown = cotune("distill", writer, writer, "--student", language_model("gpt2"), *options, *more)
    assert (shown.code, shown.err) == (0, "")
    assert "promises no differential privacy" in shown.out
    card = Path("student/README.md").read_text()
    assert "license: CC0-1.0" in card
    assert "source: prompts.jsonl" in card
    assert "Count it as trained without" in card
    assert ", weight 0.75 |" in card
    [written] = json.loads(cotune("predict", "student", "great day", "--max-new-tokens", "3", "--json").out)
    assert isinstance(written["text"], str)
    call = ("evaluate", "student", "--data", "prompts.jsonl", "--prompt", "prompt", "--target", "target", "--json")
    assert json.loads(cotune(*call).out)["records"] == 60


def test_teachers_write_targets_for_prompts_alone(cotune: Cotune, writer: Path, language_model: Callable[..., Path]) -> None:
    options = ("--data", "prompts.jsonl", "--prompt", "prompt", "--write-targets", "16", "--learning-rate", "2e-2")
    call = ("distill", writer, "--student", language_model("gpt2"), *options, "--out", "student", "--json")
    found = json.loads(cotune(*call).out)
    assert found["written"] == 16
    assert found["held_out"]["student"]["loss"] < found["held_out"]["before"]["student"]["loss"]
    assert found["unprotected"] == [str(writer)]


@pytest.mark.parametrize(
    "options",
    [
        ("--label", "label", "--prompt", "prompt", "--target", "target"),
        ("--test", "prompts.jsonl", "--prompt", "prompt", "--target", "target"),
        ("--prompt", "prompt"),
        ("--train", "head", "--text", "target"),
        ("--train", "blocks", "--text", "target"),
        ("--write-targets", "0", "--prompt", "prompt"),
        *(("--teacher-weights", given, "--text", "target") for given in ("1,1", "-1", "nan", "inf", "0", "a", "")),
    ],
)
def test_mistakes_with_language_models_are_one_sentence(cotune: Cotune, writer: Path, options: tuple[str, ...]) -> None:
    shown = cotune("distill", writer, "--student", writer, "--data", "prompts.jsonl", "--out", "student", *options)
    assert shown.code == 2
    assert "Traceback" not in shown.err
    assert not Path("student").exists()
    assert not Path("student.part").exists()


@pytest.mark.parametrize(
    ("columns", "write", "code"),
    [
        (RecordOptions(prompt="prompt", target="target"), 4, "data.invalid_description"),
        (RecordOptions(prompt="prompt", target="target", text="prompt"), None, "data.invalid_description"),
        (RecordOptions(prompt="prompt"), None, "data.invalid_description"),
        (RecordOptions(), 4, "data.invalid_description"),
        (RecordOptions(messages="prompt"), None, "data.no_records"),
        (RecordOptions(messages="messages"), None, "model.no_chat_template"),
        (RecordOptions(text="nothing"), None, "data.missing_column"),
        (RecordOptions(prompt="nothing"), 4, "data.missing_column"),
    ],
)
def test_columns_that_say_nothing_are_refused(writer: Path, columns: RecordOptions, write: int | None, code: str) -> None:
    base = ModelConfig(base=str(writer), max_length=16)
    given = ([str(writer)], "causal-lm", base, DistillationConfig(), Path("prompts.jsonl"), columns)
    with pytest.raises(CotuneError) as caught:
        distill_texts(*given, write=write, out=Path("student"), device="cpu", license="", source="")  # type: ignore[arg-type]
    assert caught.value.code == code


def test_classifiers_and_language_models_do_not_mix(cotune: Cotune, writer: Path, teacher: Path) -> None:
    for teachers in ((str(writer), str(teacher)), (str(teacher), str(writer))):
        with pytest.raises(CotuneError) as caught:
            find_task(teachers)
        assert caught.value.code == "model.other_task"
    with pytest.raises(CotuneError) as caught:
        find_task([str(writer), "no/folder"])
    assert caught.value.code == "model.missing_base"
    options = ("--data", "prompts.jsonl", "--out", "student", "--text", "prompt")
    assert cotune("distill", teacher, "--student", writer, *options, "--prompt", "prompt").code == 2
    assert cotune("distill", writer, "--student", teacher, *options).code == 2
    assert not Path("student").exists()
