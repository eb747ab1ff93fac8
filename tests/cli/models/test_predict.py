from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from cotune.client.final_model import store_final_model
from cotune.data.config import TaskName
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.export import export_model
from cotune.models.features.cached import encode_batch
from cotune.models.features.head_fit import fit_head, head_names
from cotune.models.trainable import TrainableModel
from cotune.privacy.policy import Policy
from cotune.protocol.messages import Request
from tests.support import clinic
from tests.support.console import Cotune
from tests.support.datasets import COLORS, sentences, write_csv, write_images, write_tagged

LABELS = ("bad", "good", "so")


@pytest.fixture
def model(base_model: Callable[[str], Path], folder: Path) -> Callable[..., Path]:
    """(kind, task, labels) -> the folder of an exported model; of sentences one that has learned."""

    def make(kind: str = "bert", task: TaskName = "sequence-classification", labels: tuple[str, ...] = LABELS) -> Path:
        config = ModelConfig.model_validate({"base": str(base_model(kind)), "pooling": "mean" if labels == LABELS else "auto"})
        made = TrainableModel(load_model(config, labels, 1, task), None, 1, torch.device("cpu"))
        if labels == LABELS:
            rows = sentences(120)
            features = made.loaded.task.examples(made.loaded.reader, 32, [text for text, _ in rows], [0] * len(rows))
            start = made.state(head_names(made))
            targets = torch.tensor([labels.index(label) for _, label in rows])
            made.load(fit_head(made, encode_batch(made, features, "float32"), targets, start=start, toward=start, pull=1e-4))
        target = folder / f"model-{kind}-{task}"
        export_model(made, target)
        return target

    return make


def test_texts_are_predicted(cotune: Cotune, model: Callable[..., Path]) -> None:
    folder = model()
    shown = cotune("predict", folder, "great happy lovely", "awful poor sad")
    assert (shown.code, shown.err) == (0, "")
    assert [line.split()[0] for line in shown.out.splitlines()] == ["label", "good", "bad"]
    found = json.loads(cotune("predict", folder, "great happy lovely", "--json").out)
    assert found[0]["label"] == "good"
    assert sum(found[0]["scores"].values()) == pytest.approx(1)
    assert found[0]["score"] == max(found[0]["scores"].values())


def test_a_file_keeps_its_rows(cotune: Cotune, model: Callable[..., Path], folder: Path) -> None:
    (folder / "in.csv").write_text('id,note\n7,great happy\n8,\n9,"awful, poor"\n', encoding="utf-8")
    made = model()
    assert cotune("predict", made, "--file", "in.csv", "--text", "note", "--out", "out.csv").code == 0
    rows = list(csv.DictReader((folder / "out.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["row"], row["input"]) for row in rows] == [("1", "great happy"), ("2", ""), ("3", "awful, poor")]
    assert [row["label"] in LABELS for row in rows] == [True, False, True]
    assert rows[1]["reason"] == "blank text"
    cotune("predict", made, "--file", "in.csv", "--text", "note", "--out", "out.jsonl")
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"] or "" for line in lines] == [row["label"] for row in rows]


def test_a_threshold_tells_a_rare_class(cotune: Cotune, model: Callable[..., Path]) -> None:
    made = model()
    text = "awful great"
    probabilities = json.loads(cotune("predict", made, text, "--json").out)[0]["scores"]
    rare = min(probabilities, key=probabilities.__getitem__)
    [predicted] = json.loads(cotune("predict", made, text, "--json", "--threshold", f"{rare}={probabilities[rare] * 0.9}").out)
    assert predicted["label"] == rare


def test_an_evaluation_says_what_scikit_learn_says(cotune: Cotune, model: Callable[..., Path], folder: Path) -> None:
    made = model()
    rows = sentences(80, seed=9)
    write_csv(folder / "new.csv", rows)
    shown = cotune("evaluate", made, "--data", "new.csv")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(cotune("evaluate", made, "--data", "new.csv", "--json").out)
    cotune("predict", made, "--file", "new.csv", "--out", "predicted.csv")
    predicted = [row["label"] for row in csv.DictReader((folder / "predicted.csv").read_text(encoding="utf-8").splitlines())]
    truth = [label for _, label in rows]
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["macro"]["f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert f"accuracy {found['accuracy']:.3f}" in shown.out
    assert found["records"] == 80
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high or found["accuracy"] == 1.0


def test_tags_and_their_entities(cotune: Cotune, model: Callable[..., Path], folder: Path) -> None:
    labels = ("B-BAD", "B-GOOD", "B-SO", "O")
    made = model("bert", "token-classification", labels)
    write_tagged(folder / "tags.jsonl", 30)
    found = json.loads(cotune("evaluate", made, "--data", "tags.jsonl", "--json").out)
    assert found["answers"] == sum(each["records"] for each in found["classes"])
    assert {each["type"] for each in found["entities"]["types"]} <= {"BAD", "GOOD", "SO"}
    assert found["entities"]["entities"] == 60  # two words of a kind in each sentence, each an entity of one word
    predicted = json.loads(cotune("predict", made, "the great tree", "--json").out)
    assert len(predicted[0]["label"]) == 3
    assert cotune("evaluate", made, "--data", "tags.jsonl").code == 0


def test_images(cotune: Cotune, model: Callable[..., Path], folder: Path) -> None:
    made = model("vit", "image-classification", tuple(sorted(COLORS)))
    write_images(folder / "photos", 9)
    found = json.loads(cotune("evaluate", made, "--data", "photos", "--json").out)
    assert (found["records"], found["max_length"]) == (9, None)
    predicted = json.loads(cotune("predict", made, "--file", "photos", "--json").out)
    assert len(predicted) == 9
    [one] = json.loads(cotune("predict", made, predicted[0]["input"], "--json").out)
    assert one["scores"] == pytest.approx(predicted[0]["scores"], abs=1e-5)


def test_mistakes_are_one_sentence(cotune: Cotune, model: Callable[..., Path], folder: Path) -> None:
    made = model()
    write_csv(folder / "other.csv", [("great", "superb"), ("awful", "bad")])
    write_csv(folder / "fine.csv", [("great", "good"), ("awful", "bad")])
    for arguments in (
        ("predict", made),
        ("predict", made, "text", "--file", "fine.csv"),
        ("predict", "base", "text"),
        ("predict", "nowhere", "text"),
        ("predict", made, "--file", "nothing.csv"),
        ("predict", made, "--file", "fine.csv", "--text", "comment"),
        ("predict", made, "--file", "toy.toml"),
        ("predict", made, "text", "--threshold", "good"),
        ("predict", made, "text", "--out", "predicted.xyz"),
        ("evaluate", made, "--data", "other.csv"),
        ("evaluate", made, "--data", "fine.csv", "--label", "text"),
        ("evaluate", made, "--data", "fine.csv", "--threshold", "superb=0.5"),
    ):
        refused = cotune(*arguments)
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1), (arguments, refused)
    assert cotune("predict", made, " ").code == 1  # nothing could be predicted


def test_what_is_predicted_cannot_steer_a_terminal(cotune: Cotune, model: Callable[..., Path]) -> None:
    shown = cotune("predict", model(), "great \x1b[31mred\x1b]0;title\x07 [bold]x[/bold]")
    assert shown.code == 0
    assert "\x1b" not in shown.out
    assert "\x07" not in shown.out
    assert "[bold]x[/bold]" in shown.out


def test_a_site_adapts_and_judges_what_it_received(cotune: Cotune, folder: Path) -> None:
    plan = clinic.make_plan(folder / "base", folder / "reviews.csv", model={"pooling": "mean"}, personalize={"folds": 2})
    site = clinic.make_site(folder / "site", folder / "reviews.csv", range(240), Policy.permissive())
    assert cotune("client", "adapt", "site").code == 1  # nothing has come yet
    store_final_model(Request(plan.canonical(), 3, "clinic", clinic.state_of(plan), 0), plan, site)
    done = json.loads(cotune("client", "adapt", "site", "--json").out)
    assert (done["sent"], done["epsilon"], done["records"]) == (False, 0.0, 240)
    write_csv(folder / "new.csv", sentences(60, seed=4))
    found = json.loads(cotune("client", "evaluate", "site", "--data", "new.csv", "--json").out)
    assert found["columns"]["adapted"]["accuracy"] > found["columns"]["majority"]["accuracy"]
    shown = cotune("client", "evaluate", "site", "--data", "new.csv")
    assert (shown.code, shown.err.strip()) == (0, "")
    assert found["worth"]["answer"] in shown.out
    assert not (folder / "site" / "ledger.sqlite").exists()
    measured = json.loads(cotune("evaluate", done["model"], "--data", "new.csv", "--json").out)
    assert measured["accuracy"] == pytest.approx(found["columns"]["adapted"]["accuracy"])
