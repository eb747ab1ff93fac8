"""Sequence-to-sequence models from a plan to an exported model: with ε, killed and continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from cotune.client.site import Site
from cotune.errors import PlanError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.simulations.run import Run, simulate
from tests.support.console import Cotune as CommandLine
from tests.support.console import _logging_as_it_was, folder
from tests.support.console import cotune as command_line
from tests.support.language_models import dialogs, write_dialogs
from tests.support.paired_models import paired_model, pairs_table
from tests.support.processes import Cotune, play_whole_and_killed
from tests.support.simulations import final_model, merged, same, tensors_of

__all__ = ["_logging_as_it_was", "command_line", "folder", "paired_model"]  # fixtures
NewPlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def new_plan(paired_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> NewPlan:
    source = write_dialogs(tmp_path_factory.mktemp("dialogs") / "dialogs.jsonl", 300)

    def make(kind: str = "t5", **changes: Any) -> Plan:
        return parse_plan(merged(pairs_table(kind, paired_model(kind), source), changes))

    return make


@pytest.fixture(scope="module")
def private(new_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    writing = {"generate": {"examples": 6, "max_new_tokens": 4}} if find_spec("sacrebleu") and find_spec("rouge_score") else {}
    plan = new_plan(simulation={"baselines": ["alone"]}, **writing)
    return simulate(plan, tmp_path_factory.mktemp("private") / "run", device="cpu")


def test_a_private_run_learns_beyond_the_base_model(private: Run) -> None:
    test = private.summary.test
    assert test.federated
    assert test.majority
    assert test.federated.loss < test.majority.loss - 0.1, "the unchanged base model"
    assert set(test.federated) == {"loss", "perplexity", "accuracy"}
    for organization in private.summary.organizations:
        assert Site(private.folder / "sites" / organization.name).ledger().spent()
        assert organization.epsilon_spent is not None
        assert 0 < organization.epsilon_spent <= 8.0
        assert organization.worth


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_plain_transformers_and_peft_load_what_comes_out(private: Run, new_plan: NewPlan) -> None:
    folder = private.folder / "model"
    base = AutoModelForSeq2SeqLM.from_pretrained(new_plan().model.base)
    whole = AutoModelForSeq2SeqLM.from_pretrained(folder)
    reader = AutoTokenizer.from_pretrained(folder)
    inputs = {**reader("the great day\n", return_tensors="pt"), "labels": reader("great the", return_tensors="pt").input_ids}
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        before = base(**inputs).logits
        expected = whole(**inputs).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
        torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_bytes())["task_type"] == "SEQ_2_SEQ_LM"
    written = whole.generate(input_ids=inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert written.shape[1] > 1
    assert "text2text-generation" in (folder / "README.md").read_text(encoding="utf-8")


def test_report_shows_what_the_models_write(private: Run) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    written = private.summary.test.written
    assert written
    assert (written.examples, written.left_out) == (6, 0)
    assert {"first_sentence", "base", "federated", "alone"} <= set(written.figures)
    model = AutoModelForSeq2SeqLM.from_pretrained(private.folder / "model")
    reader = AutoTokenizer.from_pretrained(private.folder / "model")
    for each in written.shown:
        ids = reader(each["prompt"] + "\n", return_tensors="pt").input_ids
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert reader.decode(generated[0, 1:], skip_special_tokens=True).strip() == each["federated"]


def test_commands_write_with_it_and_judge_it(private: Run, command_line: CommandLine, folder: Path) -> None:
    model = str(private.folder)
    found = json.loads(command_line("predict", model, "great day", " ", "--max-new-tokens", "4", "--json").out)
    whole = AutoModelForSeq2SeqLM.from_pretrained(private.folder / "model")
    reader = AutoTokenizer.from_pretrained(private.folder / "model")
    generated = whole.generate(reader("great day\n", return_tensors="pt").input_ids, max_new_tokens=4, do_sample=False)
    expected = reader.decode(generated[0, 1:], skip_special_tokens=True).strip()
    assert [(each["text"], each["reason"]) for each in found] == [(expected, ""), (None, "blank prompt")]
    data = str(write_dialogs(folder / "labeled.jsonl", 20))
    call = ("evaluate", model, "--data", data, "--prompt", "prompt", "--target", "target", "--json")
    figures = json.loads(command_line(*call).out)["figures"]
    losses, tokens = 0.0, 0
    for record in dialogs(20):
        labels = reader(record["target"], return_tensors="pt").input_ids
        with torch.no_grad():
            loss = whole(input_ids=reader(record["prompt"] + "\n", return_tensors="pt").input_ids, labels=labels).loss
        losses += float(loss) * labels.shape[1]
        tokens += labels.shape[1]
    assert figures["loss"] == pytest.approx(losses / tokens, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("predict", "MODEL", "--chat", "hello"), "model.no_chat_template"),
        (("evaluate", "MODEL", "--data", "x.jsonl"), "data.missing_file"),
        (("evaluate", "MODEL", "--data", "labeled.jsonl"), "data.invalid_description"),
        (("evaluate", "MODEL", "--data", "labeled.jsonl", "--messages", "prompt"), "model.no_chat_template"),
    ],
)
def test_commands_that_do_not_fit_are_refused(
    private: Run, command_line: CommandLine, folder: Path, words: tuple[str, ...], code: str
) -> None:
    write_dialogs(folder / "labeled.jsonl", 3)
    found = command_line(*(str(private.folder) if word == "MODEL" else word for word in words), "--json")
    assert json.loads(found.out)["error"]["code"] == code


@pytest.mark.crash
def test_a_killed_run_ends_as_if_it_had_not_been_killed(new_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = new_plan(privacy="none", simulation={"baselines": []})  # noise differs from run to run
    whole, run = play_whole_and_killed(cotune, plan, tmp_path)
    assert same(final_model(run), final_model(whole))
    assert tensors_of(run) == tensors_of(whole)


@pytest.mark.parametrize(
    "changes",
    [{"train": "head"}, {"labels": ["no", "yes"]}, {"data": {"prompt": None, "target": None}}, {"data": {"target": None}}],
)
def test_a_plan_that_does_not_fit_is_refused(new_plan: NewPlan, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as raised:
        new_plan(**changes)
    assert raised.value.code == "plan.invalid"
