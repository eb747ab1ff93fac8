from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from cotune.data.config import TaskName
from cotune.data.unlabeled import read_typed, read_unlabeled
from cotune.errors import DataError, ModelError
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.evaluation.predictor import open_predictor
from cotune.models.export import export_model
from cotune.models.trainable import TrainableModel
from tests.support.datasets import COLORS, write_images
from tests.support.failures import fails_with

LABELS = ("bad", "good", "so")
TRAINED = 8  # tokens
TEXTS = ("great", "the table is very sad and this is a fine day of the tree", "awful road")


def export(base: Path, folder: Path, task: TaskName = "sequence-classification", labels: tuple[str, ...] = LABELS) -> Path:
    model = TrainableModel(
        load_model(ModelConfig(base=str(base), max_length=TRAINED), labels, 1, task), None, 1, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(2)
    names = model.names("head")
    model.load({n: torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()})
    export_model(model, folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_probabilities_are_those_of_transformers(base_model: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    folder = export(base_model(kind), tmp_path / "model")
    predictor = open_predictor(str(folder), "cpu")
    assert (predictor.labels, predictor.task, predictor.max_length) == (LABELS, "sequence-classification", TRAINED)
    theirs = pipeline("text-classification", str(folder), truncation=True)(list(TEXTS), top_k=None)
    for ours, predicted in zip(predictor.probabilities(TEXTS), theirs, strict=True):
        scores = {each["label"]: each["score"] for each in predicted}
        assert ours[0].tolist() == pytest.approx([scores[label] for label in LABELS], abs=1e-5)


def test_words_have_tags_as_far_as_they_were_read(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = export(base_model("bert"), tmp_path / "model", "token-classification", ("O", "B-X"))
    predictor = open_predictor(str(folder), "cpu")
    words = tuple(("the sad tree " * 5).split())
    [found] = predictor.probabilities([words])
    predicted = pipeline("token-classification", str(folder), ignore_labels=[])(" ".join(words))
    assert found.shape == (15, 2)
    assert found[:TRAINED].max(dim=1).values.tolist() == pytest.approx([each["score"] for each in predicted], abs=1e-5)
    assert found[TRAINED:].isnan().all()


def test_a_run_is_opened_by_its_folder(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    export(base_model("bert"), tmp_path / "run" / "model")
    assert open_predictor(str(tmp_path / "run"), "cpu").labels == LABELS


def test_fewer_tokens_can_be_asked_for(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = export(base_model("bert"), tmp_path / "model")
    short = open_predictor(str(folder), "cpu", max_length=2)
    assert torch.equal(short.probabilities(["great fine awful"])[0], short.probabilities(["great fine"])[0])


def changed(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_what_cannot_be_used_is_one_sentence(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = export(base_model("bert"), tmp_path / "good")
    broken = {
        "no head": lambda f: changed(f, architectures=["BertModel"]),
        "another architecture": lambda f: changed(f, architectures=["BertForMaskedLM"]),
        "an unknown problem": lambda f: changed(f, problem_type="ordinal"),
        "one class": lambda f: changed(f, id2label={"0": "x"}, label2id={"x": 0}),
        "more classes than the head": lambda f: changed(f, id2label={str(i): str(i) for i in range(9)}, label2id={}),
        "no weights": lambda f: (f / "model.safetensors").unlink(),
        "a pickle": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "no words": lambda f: (f / "tokenizer.json").unlink(),
        "an architecture that is no list": lambda f: changed(f, architectures=5),
        "an unknown kind": lambda f: changed(f, model_type="zzz", id2label={}, label2id={}),
        "names without a head": lambda f: changed(f, id2label=["a", "b"]),
        "no configuration": lambda f: (f / "config.json").write_text("{"),
    }
    for name, spoil in broken.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        spoil(copy)
        with pytest.raises(ModelError) as raised:
            open_predictor(str(copy), "cpu")
        assert "\n" not in str(raised.value), name
    with pytest.raises(ModelError):
        open_predictor(str(base_model("bert")), "cpu")  # an encoder alone has no trained head


def test_code_in_the_folder_does_not_run(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = export(base_model("bert"), tmp_path / "model")
    trace = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Model: pass\nclass Config: pass\nclass Tok: pass\n")
    changed(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"})
    open_predictor(str(folder), "cpu")
    assert not trace.exists()


@pytest.mark.parametrize("content", ["label,SECRET was here\na,b\n", "SECRET has asthma\nJohn Roe\n", 'a,"x\nb" c,d\n'])
def test_a_file_that_cannot_be_predicted_is_not_quoted(tmp_path: Path, content: str) -> None:
    (tmp_path / "in.csv").write_text(content)
    with pytest.raises(DataError) as raised:
        read_unlabeled(tmp_path / "in.csv", "sequence-classification")
    assert "SECRET" not in str(raised.value)
    (tmp_path / "named.csv").write_text("review,label\n" + "a,b\n" * 12)
    with fails_with("data.missing_column", "label, review"):
        read_unlabeled(tmp_path / "named.csv", "sequence-classification")


def test_every_row_of_a_file_has_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text('note,text\na,great day\nb,\nc,"awful, sad"\n')
    rows = read_unlabeled(file, "sequence-classification")
    assert [(row.given, row.reason == "") for row in rows] == [("great day", True), (None, False), ("awful, sad", True)]
    noted = read_unlabeled(file, "sequence-classification", column="note")
    assert [row.given for row in noted] == ["a", "b", "c"]
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"text": ["great", "day"]}\n{"text": "awful sad road"}\n{"text": {"a": 1}}\n{}\n')
    tags = read_unlabeled(lines, "token-classification")
    assert [row.given for row in tags] == [("great", "day"), ("awful", "sad", "road"), None, None]
    assert all("\n" not in row.reason for row in tags)


def test_images_of_a_folder_and_by_name(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", 4)
    (folder / "red" / "broken.png").write_bytes(b"none")
    rows = read_unlabeled(folder, "image-classification")
    assert len(rows) == 5
    assert [Path(row.shown).name for row in rows if row.given is None] == ["broken.png"]
    assert {Path(row.shown).parent.name for row in rows} == set(COLORS)
    [typed] = read_typed([rows[-1].shown], "image-classification")
    assert typed.given == rows[-1].given
