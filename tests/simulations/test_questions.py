"""Models that answer questions, from a plan to an exported model: with ε, by the commands, killed and continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from cotune.client.site import Site
from cotune.client.training.checks import gradient_checks
from cotune.client.training.stage_setup import from_records
from cotune.data.record_reading import read_records
from cotune.errors import PlanError
from cotune.models.physical_batch import PhysicalBatch
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.config import RecordPrivacy
from cotune.simulations.run import Run, simulate
from tests.support.console import Cotune as CommandLine
from tests.support.console import _logging_as_it_was, folder
from tests.support.console import cotune as command_line
from tests.support.exported_models import export_random
from tests.support.processes import Cotune, play_whole_and_killed
from tests.support.questions import questions, questions_table, write_questions
from tests.support.simulations import final_model, merged, same, tensors_of

__all__ = ["_logging_as_it_was", "command_line", "folder"]  # fixtures
NewPlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def new_plan(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> NewPlan:
    source = write_questions(tmp_path_factory.mktemp("questions") / "questions.jsonl", 300)

    def make(**changes: Any) -> Plan:
        return parse_plan(merged(questions_table(base_model("shallow-bert"), source), changes))

    return make


@pytest.fixture(scope="module")
def private(new_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(new_plan(), tmp_path_factory.mktemp("private") / "run", device="cpu")


def test_private_run_learns_beyond_a_new_head(private: Run) -> None:
    test = private.summary.test
    assert test.federated
    assert test.majority
    assert test.federated.token_f1 > test.majority.token_f1 + 0.05
    assert set(test.federated) == {"token_f1", "exact_answer"}
    for organization in private.summary.organizations:
        assert Site(private.folder / "sites" / organization.name).ledger().spent()
        assert 0 < (organization.epsilon_spent or 0) <= 8.0
        assert organization.worth
    page = (private.folder / "report.html").read_text(encoding="utf-8")
    assert "Exact answers" in page or "exact answers" in page


def words(text: str) -> list[str]:
    """Return those that count for an exact answer of SQuAD."""
    return [word for word in text.lower().split() if word not in {"a", "an", "the"}]


def test_commands_answer_as_transformers_does(private: Run, command_line: CommandLine, folder: Path) -> None:
    model = str(private.folder)
    found = json.loads(command_line("predict", model, "the great day", " ", "--question", "is it", "--json").out)
    whole = AutoModelForQuestionAnswering.from_pretrained(private.folder / "model")
    reader = AutoTokenizer.from_pretrained(private.folder / "model")
    given = reader("is it", "the great day", return_tensors="pt", return_offsets_mapping=True)
    offsets = given.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        output = whole(**given)
    places = [place for place, part in enumerate(given.sequence_ids(0)) if part == 1]
    pairs = [(a, b) for a in places for b in places if a <= b]
    first, last = max(pairs, key=lambda pair: float(output.start_logits[0, pair[0]] + output.end_logits[0, pair[1]]))
    assert found[0]["text"] == "the great day"[offsets[first][0] : offsets[last][1]]
    assert (found[1]["text"], found[1]["reason"]) == (None, "blank context")
    data = write_questions(folder / "labeled.jsonl", 20, seed=1)
    figures = json.loads(command_line("evaluate", model, "--data", str(data), "--json").out)["figures"]
    rows = json.loads(command_line("predict", model, "--file", str(data), "--json").out)
    exact = [
        words(row["text"]) == words(question["answers"][0]) for row, question in zip(rows, questions(20, seed=1), strict=True)
    ]
    assert figures["exact_answer"] == pytest.approx(sum(exact) / 20)
    low, high = figures["token_f1_interval"]
    assert low <= figures["token_f1"] <= high


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("predict", "MODEL", "the day"), "data.no_question"),
        (("predict", "base", "the day", "--question", "is it"), "model.no_question_answering"),
        (("predict", "MODEL", "--file", "labeled.jsonl", "--question", "nothing"), "data.missing_column"),
        (("evaluate", "MODEL", "--data", "labeled.jsonl", "--answers", "nothing"), "data.missing_column"),
    ],
)
def test_commands_that_do_not_fit_are_refused(
    private: Run, command_line: CommandLine, folder: Path, base_model: Callable[[str], Path], words: tuple[str, ...], code: str
) -> None:
    write_questions(folder / "labeled.jsonl", 3)
    named = {"MODEL": str(private.folder), "base": str(classifier_in(folder, base_model("bert")))}
    found = command_line(*(named.get(word, word) for word in words), "--json")
    assert json.loads(found.out)["error"]["code"] == code


def classifier_in(folder: Path, base: Path) -> Path:
    export_random(base, folder / "classifier", ("bad", "good", "so"), seed=0)
    return folder / "classifier"


@pytest.mark.parametrize("mode", ["lora", "head", "full"])
def test_clipped_gradients_are_those_of_one_record_at_a_time(new_plan: NewPlan, mode: str) -> None:
    """Of real records of unlike lengths; alone they are not padded."""
    plan = new_plan(train=mode)
    model = get_plan_model(plan, "cpu")
    [stage] = plan.stages
    model.load({})
    model.train_only(model.names(stage.mode))
    records = read_records(plan.data, task=plan.task).select(range(7))
    examples = model.loaded.task.examples(model.loaded.reader, model.loaded.max_length, records.inputs, [0] * 7)
    made = from_records._on_examples(plan, stage, model, examples, [[row] for row in range(7)], PhysicalBatch(32, model.device))
    assert isinstance(plan.privacy, RecordPrivacy)
    assert gradient_checks._clipping_error(made, plan.privacy) < 1e-5


@pytest.mark.crash
def test_killed_run_ends_as_if_it_had_not_been_killed(new_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = new_plan(privacy="none", rounds=2, simulation={"baselines": []})  # noise differs from run to run
    whole, run = play_whole_and_killed(cotune, plan, tmp_path)
    assert same(final_model(run), final_model(whole))
    assert tensors_of(run) == tensors_of(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ["no", "yes"]},
        {"class_weights": {"no": 0.5}},
        {"data": {"messages": "messages"}},
        {"data": {"context": "question"}},
        {"generate": {}},
        {"model": {"target_range": [0.0, 1.0]}},
        {"model": {"feature": {"layers": [1]}}},
    ],
)
def test_plan_that_does_not_fit_is_refused(new_plan: NewPlan, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as raised:
        new_plan(**changes)
    assert raised.value.code == "plan.invalid"
