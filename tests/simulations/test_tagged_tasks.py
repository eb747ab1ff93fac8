"""A task of tags beside tasks of whole texts on one encoder: exported each by itself, and measured like each alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from cotune.errors import CotuneError
from cotune.models.evaluation.predictor import evaluate_classifier, open_predictor
from cotune.plan.load import dump_plan, parse_plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import RunFolder
from cotune.server.runs.run_model import final_params
from cotune.simulations.prepare import prepare
from cotune.simulations.run import Run, simulate
from cotune.storage.json_documents import parse_toml
from tests.support.multi_task import TAGGED, NewPlan

HELD = [["mood", "words"], ["length", "words"], ["mood", "length"]]
THREE: dict[str, Any] = {"clients": 3, "tasks": HELD}
TEXT = "the awful road was very sad and it is poor"
KINDS = {"mood": AutoModelForSequenceClassification, "words": AutoModelForTokenClassification}


@pytest.fixture(scope="module")
def trained(tagged_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = tagged_plan(rounds=3, simulation={**THREE, "baselines": ["single"]}, local={"steps": 8})
    return simulate(plan, tmp_path_factory.mktemp("tagged") / "run", device="cpu")


@pytest.mark.parametrize("name", KINDS)
def test_each_task_is_a_plain_model_of_transformers(trained: Run, name: str) -> None:
    """Its scores are those of the shared model; every tensor of the folder is one that its class has, and the other way round."""
    folder = RunFolder(trained.folder)
    model = get_plan_model(folder.plan, "cpu")
    model.load(final_params(folder.plan, folder.load()))
    task = model.loaded.task
    collate = task.collator(model.module, model.loaded.reader, model.device)
    given = task.examples(model.loaded.reader, model.loaded.max_length, [tuple(TEXT.split())], [()])
    mine = [i for i, label in enumerate(TAGGED) if label.startswith(f"{name}/")]
    path = trained.folder / "model" / name
    plain, loading = KINDS[name].from_pretrained(path, output_loading_info=True)
    with torch.no_grad():
        shared = task.scores(model.module, collate(given))[0][:, mine]
        told = plain(**AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt")).logits
    torch.testing.assert_close(told[0], shared[0] if name == "mood" else shared, rtol=1e-4, atol=1e-5)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tuple(plain.config.id2label.values()) == tuple(TAGGED[i].split("/")[1] for i in mine)
    encoders = {each: load_file(trained.folder / "model" / each / "model.safetensors") for each in KINDS}
    common = [key for key in encoders["words"] if key.startswith("bert.")]
    assert all(torch.equal(encoders["mood"][key], encoders["words"][key]) for key in common)


def test_figures_of_tags_are_those_of_the_exported_model(trained: Run, tagged_plan: NewPlan) -> None:
    """The accuracy per word of the report is that of `cotune evaluate` on the same test records; and tags are learned."""
    folder = RunFolder(trained.folder)
    prepared = prepare(folder.plan)
    held = prepared.records[None]
    rows = [int(row) for row in prepared.test[0][1] if any(name.startswith("words/") for name in held.labels[int(row)])]
    text = trained.folder / "tags.jsonl"
    lines = []
    for row in rows:
        tags = [name.split("/")[1] for name in held.labels[row] if name.startswith("words/")]
        lines.append(json.dumps({"text": list(held.inputs[row]), "label": tags}))  # type: ignore[arg-type]
    text.write_text("\n".join(lines), encoding="utf-8")
    records = read_records(DataConfig(source=str(text)), text, "token-classification")
    predictor = open_predictor(str(trained.folder / "model" / "words"), "cpu")
    accuracy = evaluate_classifier(predictor, records)["accuracy"]
    summary = json.loads((trained.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["test"]["federated"]["words/accuracy"] == pytest.approx(accuracy)
    assert accuracy > summary["test"]["majority"]["words/accuracy"]


def test_the_card_names_the_pipeline_of_each_task(trained: Run) -> None:
    card = (trained.folder / "model" / "README.md").read_text(encoding="utf-8")
    assert 'pipeline("text-classification", "FOLDER/mood"' in card
    assert "mood (text-classification), length (text-classification), words (token-classification)" in card


def test_the_gain_of_tags_is_measured(trained: Run) -> None:
    summary = json.loads((trained.folder / "summary.json").read_text(encoding="utf-8"))
    words = next(task for task in summary["tasks"] if task["name"] == "words")
    assert words["holders"] == ["org-1", "org-2"]
    assert words["all"]["gain"] == pytest.approx(words["all"]["federated"] - words["all"]["single"])
    assert words["all"]["federated"] == pytest.approx(summary["test"]["federated"]["words/accuracy"])
    baseline = RunFolder(trained.folder / "baselines" / "single" / "words")
    assert baseline.plan.labels == TAGGED[5:]


def test_a_plan_with_tags_is_the_same_when_it_is_read_again(tagged_plan: NewPlan) -> None:
    resolved = prepare(tagged_plan()).plan
    assert parse_plan(parse_toml(dump_plan(resolved))) == resolved
    assert resolved.data.tags == ("words",)


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "images beside tags": {
        "tasks": [{"name": "words", "type": "token-classification"}, {"name": "i", "type": "image-classification"}]
    },
    "mean pooling": {"model": {"pooling": "mean"}},
    "other tags": {"data": {"tags": ["mood"]}},
    "heads alone": {"train": "head"},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_cannot_be_had_with_tags_is_refused(tagged_plan: NewPlan, what: str) -> None:
    changes = IMPOSSIBLE[what]
    if "data" in changes:
        changes = {"data": {"source": tagged_plan().data.source, **changes["data"]}}
    with pytest.raises(CotuneError) as refused:
        tagged_plan(**changes)
    assert refused.value.code == "plan.invalid"
