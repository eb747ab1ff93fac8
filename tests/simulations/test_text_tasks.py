"""Tasks whose answers are no classes, from a plan to an exported model: with ε, killed and continued, predicted and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from cotune.cli.models.record_predictions import evaluate_records, predict_rows
from cotune.client.site import Site
from cotune.data.config import DataConfig
from cotune.ensembles.predictor import open_model, require_classifiers
from cotune.errors import ModelError, PlanError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.required_classes import require_classes
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.verdict import conclude_verdict
from cotune.simulations.run import Run, simulate
from tests.support.processes import Cotune, play_whole_and_killed
from tests.support.simulations import final_model, merged, same, tensors_of
from tests.support.text_tasks import LABELS, ROWS, table_of, write_rows

NewPlan = Callable[..., Plan]
TASKS = ("regression", "multi-label")
DECIDES = {"regression": "mse", "multi-label": "micro_f1"}


@pytest.fixture(scope="module")
def new_plan(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> NewPlan:
    folder = tmp_path_factory.mktemp("records")

    def make(task: str, **changes: Any) -> Plan:
        file = folder / f"{task}.jsonl"
        if not file.exists():
            write_rows(file, ROWS[task](400))
        return parse_plan(merged(table_of(task, base_model("bert"), file), changes))

    return make


@pytest.fixture(scope="module", params=TASKS)
def private(request: pytest.FixtureRequest, new_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    task: str = request.param
    return task, simulate(new_plan(task), tmp_path_factory.mktemp("private") / "run", device="cpu")


def test_a_private_run_learns_and_says_so(private: tuple[str, Run]) -> None:
    task, run = private
    test = run.summary.test
    assert test.federated
    assert test.majority
    gain = test.federated[DECIDES[task]] - test.majority[DECIDES[task]]
    assert gain < -0.1 if task == "regression" else gain > 0.1
    for organization in run.summary.organizations:
        spent = Site(run.folder / "sites" / organization.name).ledger().spent()
        assert spent
        assert organization.epsilon_spent is not None
        assert 0 < organization.epsilon_spent <= 8.0
        assert organization.worth
        assert organization.own
        assert organization.own.federated
        low, high = organization.own.federated[f"{DECIDES[task]}_interval"]
        assert low <= organization.own.federated[DECIDES[task]] <= high
    said = conclude_verdict(run.summary)
    unit = "squared error" if task == "regression" else "points of micro F1"
    assert unit in said.sentence
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert ("R²" in page) == (task == "regression")
    assert ("Always the mean" if task == "regression" else "Each label&#39;s frequency") in page


def test_a_summary_has_the_figures_of_its_task_alone(private: tuple[str, Run]) -> None:
    task, run = private
    table = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    of = {
        "regression": {"mse", "mae", "spearman", "r2"},
        "multi-label": {"micro_f1", "macro_f1", "mean_average_precision", "exact"},
    }
    assert set(table["test"]["federated"]) == of[task]
    assert table["labels"] == (list(LABELS) if task == "multi-label" else [])
    assert RunSummary.model_validate(table).as_json() == table


def test_plain_transformers_says_what_cotune_predicts(private: tuple[str, Run]) -> None:
    task, run = private
    folder = run.folder / "model"
    module = AutoModelForSequenceClassification.from_pretrained(folder)
    reader = AutoTokenizer.from_pretrained(folder)
    texts = ["a great happy day", "sad poor awful and angry"]
    with torch.no_grad():
        scores = torch.cat([module(**reader(text, return_tensors="pt")).logits for text in texts])
    rows = predict_rows(str(run.folder), texts, column=None, encoding="utf-8", threshold=None, max_length=None, device="cpu")
    served = pipeline("text-classification", model=module, tokenizer=reader, top_k=None)(texts)
    if task == "regression":
        assert [row["value"] for row in rows] == pytest.approx(scores[:, 0].tolist(), rel=1e-4)
        assert [each[0]["score"] for each in served] == pytest.approx([row["value"] for row in rows], rel=1e-4)
        assert 1 < rows[1]["value"] < rows[0]["value"] < 5, "in the units of the records"
    else:
        for row, score, each in zip(rows, torch.sigmoid(scores), served, strict=True):
            assert list(row["scores"].values()) == pytest.approx(score.tolist(), abs=1e-5)
            assert {one["label"]: one["score"] for one in each} == pytest.approx(row["scores"], abs=1e-5)
            assert row["labels"] == [label for label, value in row["scores"].items() if value > 0.5]


def test_evaluating_gives_the_figures_of_the_run(private: tuple[str, Run], new_plan: NewPlan) -> None:
    task, run = private
    data = DataConfig(source=new_plan(task).data.source)
    found = evaluate_records(str(run.folder), data, threshold=None, max_length=None, device="cpu")
    assert (found["task"], found["records"], found["not_predicted"]) == (task, 400, 0)
    figures = found["figures"]
    low, high = figures[f"{DECIDES[task]}_interval"]
    assert low <= figures[DECIDES[task]] <= high
    assert run.summary.test.federated
    assert figures[DECIDES[task]] == pytest.approx(run.summary.test.federated[DECIDES[task]], abs=0.35)


def test_classes_are_wanted_where_one_is_right(private: tuple[str, Run], new_plan: NewPlan) -> None:
    task, run = private
    with pytest.raises(ModelError) as raised:
        require_classifiers([open_model(str(run.folder), "cpu")], [str(run.folder)])
    assert raised.value.code == "model.no_classifier"
    with pytest.raises(PlanError) as refused:
        require_classes(new_plan(task), "adapting the received model")
    assert refused.value.code == "plan.no_classes"


@pytest.mark.crash
@pytest.mark.parametrize("task", [TASKS[0], *(pytest.param(task, marks=pytest.mark.long) for task in TASKS[1:])])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(task: str, new_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = new_plan(task, train="lora", privacy="none", rounds=2, simulation={"baselines": []})  # noise differs from run to run
    whole, run = play_whole_and_killed(cotune, plan, tmp_path)
    assert same(final_model(run), final_model(whole))
    assert tensors_of(run) == tensors_of(whole)
    one, other = (json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (run, whole))
    assert one["test"] == other["test"]


# --- what does not fit together is refused


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("regression", {"model": {"target_range": None}}),
        ("regression", {"model": {"target_range": [5.0, 1.0]}}),
        ("regression", {"labels": ["no", "yes"]}),
        ("regression", {"disclosures": {"label_histogram": True}}),
        ("multi-label", {"model": {"target_range": [0.0, 1.0]}}),
        ("multi-label", {"disclosures": {"label_histogram": True}}),
        ("multi-label", {"labels": ["bad", "good"], "class_weights": {"odd": 2.0}}),
    ],
)
def test_a_plan_that_does_not_fit_its_task_is_refused(new_plan: NewPlan, task: str, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as raised:
        new_plan(task, **changes)
    assert raised.value.code == "plan.invalid"
