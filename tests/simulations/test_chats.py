"""Language models that are trained on chats, from a plan to an exported model that plain transformers chats with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotune.data.record_reading import read_records
from cotune.data.skipped_records import count_cut_texts
from cotune.errors import ModelError, PlanError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.simulations.prepare import prepare
from cotune.simulations.run import Run, simulate
from tests.support.chats import TEMPLATES, chats, said, write_chat_model, write_chats
from tests.support.console import Cotune, _logging_as_it_was, cotune, folder
from tests.support.simulations import merged
from tests.support.text_tasks import PRIVATE

__all__ = ["_logging_as_it_was", "cotune", "folder"]  # fixtures
NewPlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def new_plan(base: Path, tmp_path_factory: pytest.TempPathFactory) -> NewPlan:
    source = write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 120)

    def make(**changes: Any) -> Plan:
        table: dict[str, Any] = {
            "name": "chats",
            "task": "causal-lm",
            "train": "lora",
            "rounds": 2,
            "privacy": PRIVATE,
            "model": {"base": str(base), "max_length": 128, "precision": "float32"},
            "data": {"source": str(source), "messages": "messages"},
            "lora": {"rank": 4, "factors": "ab", "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]},
            "local": {"learning_rate": 0.02, "optimizer": "adam", "batch_size": 0.25, "steps": 4, "physical_batch_size": 32},
            "simulation": {"clients": 2, "partition": "iid", "min_examples": 10, "baselines": []},
        }
        return parse_plan(merged(table, changes))

    return make


@pytest.fixture(scope="module")
def private(new_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    writing = {"generate": {"examples": 4, "max_new_tokens": 4}} if find_spec("sacrebleu") and find_spec("rouge_score") else {}
    return simulate(new_plan(**writing), tmp_path_factory.mktemp("private") / "run", device="cpu")


def test_private_run_learns_to_answer(private: Run) -> None:
    test = private.summary.test
    assert test.federated
    assert test.majority
    assert test.federated.loss < test.majority.loss - 0.02, "the unchanged base model"
    assert all(0 < (each.epsilon_spent or 0) <= 8 for each in private.summary.organizations)


def test_export_keeps_the_chat_template_and_chats(private: Run, cotune: Cotune) -> None:
    """With plain transformers, and the same texts with `cotune predict --chat`."""
    reader = AutoTokenizer.from_pretrained(private.folder / "model")
    assert reader.chat_template == TEMPLATES["chatml"]
    model = AutoModelForCausalLM.from_pretrained(private.folder / "model")
    ids = reader.apply_chat_template(said("the day"), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ends = [reader.eos_token_id, reader.convert_tokens_to_ids("<|im_end|>")]
    with torch.no_grad():
        generated = model.generate(**ids, max_new_tokens=5, do_sample=False, eos_token_id=ends)
    expected = reader.decode(generated[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    call = ("predict", str(private.folder), "--chat", "the day", " ", "--max-new-tokens", "5", "--json")
    found = json.loads(cotune(*call).out)
    assert [(each["input"], each["text"], each["reason"]) for each in found] == [
        ("the day", expected, ""),
        ("record 2", None, "blank chat"),
    ]


def test_report_shows_chats_of_the_test_set(private: Run) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    written = private.summary.test.written
    assert written
    assert (written.examples, written.left_out) == (4, 0)
    assert {(each["prompt"], each["target"]) for each in written.shown} <= {
        (f"user: {chat[0]['content']}", chat[1]["content"]) for chat in chats(120)
    }


def test_loss_on_chats_is_that_of_transformers(base: Path, cotune: Cotune, folder: Path) -> None:
    data = write_chats(folder / "labeled.jsonl", 6)
    call = ("evaluate", str(base), "--data", str(data), "--messages", "messages", "--max-length", "200", "--json")
    figures = json.loads(cotune(*call).out)["figures"]
    reader = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    losses, tokens = 0.0, 0
    for chat in chats(6):
        prompt = reader.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
        whole = reader.apply_chat_template(chat, return_dict=False)[:-1]  # without the line break behind the last turn
        labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
        with torch.no_grad():
            losses += float(model(torch.tensor([whole]), labels=labels).loss) * (len(whole) - len(prompt))
        tokens += len(whole) - len(prompt)
    assert figures["loss"] == pytest.approx(losses / tokens, rel=1e-5)


def test_file_of_chats_is_answered_row_by_row(base: Path, cotune: Cotune, folder: Path) -> None:
    file = folder / "new.jsonl"
    file.write_text("".join(json.dumps({"talk": chat}) + "\n" for chat in [*chats(3), []]))
    found = json.loads(cotune("predict", str(base), "--file", str(file), "--messages", "talk", "--json").out)
    assert [each["input"] for each in found] == [*(chat[0]["content"] for chat in chats(3)), "record 4"]
    assert [each["text"] is None for each in found] == [False, False, False, True]


def test_another_chat_template_is_another_base(base: Path, new_plan: NewPlan, tmp_path: Path) -> None:
    """The plan binds it with the tokenizer: an organization with another one takes no part."""
    pinned = prepare(new_plan(), "cpu").plan
    other = tmp_path / "base"
    shutil.copytree(base, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<|im_end|>", "<|eot_id|>"), encoding="utf-8")
    with pytest.raises(ModelError) as raised:
        get_plan_model(pinned.model_copy(update={"model": pinned.model.model_copy(update={"base": str(other)})}), "cpu")
    assert raised.value.code == "model.other_hash"


@pytest.mark.parametrize(
    ("template", "code"), [(None, "model.no_chat_template"), ("{% include 'x' %}", "model.unusable_chat_template")]
)
def test_plan_of_chats_needs_a_template_that_works(new_plan: NewPlan, tmp_path: Path, template: str | None, code: str) -> None:
    other = write_chat_model(tmp_path / "base", template)
    with pytest.raises(ModelError) as raised:
        prepare(new_plan(model={"base": str(other)}), "cpu")
    assert raised.value.code == code


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "seq2seq", "data": {"prompt": "p", "target": "t"}},
        {"task": "seq2seq"},
        {"task": "sequence-classification", "train": "head"},
        {"data": {"prompt": "prompt", "target": "target"}},
        {"data": {"text": "words"}},
        {"data": {"separator": " "}},
    ],
)
def test_impossible_pairs_with_chats_are_refused(new_plan: NewPlan, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as raised:
        new_plan(**changes)
    assert raised.value.code == "plan.invalid"


def test_chats_that_a_template_refuses_are_counted(new_plan: NewPlan, tmp_path: Path) -> None:
    gemma = write_chat_model(tmp_path / "base", TEMPLATES["gemma"])
    source = write_chats(tmp_path / "chats.jsonl", 10)
    with source.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"messages": said("a", f"b {i}", system="brief")}) + "\n" for i in range(3))
    plan = new_plan(model={"base": str(gemma)}, data={"source": str(source)})
    records = read_records(plan.data, task=plan.task)
    assert count_cut_texts(get_plan_model(plan, "cpu"), records.inputs) == {"refused by the chat template": 3}


def test_chats_are_for_language_models(cotune: Cotune, base_model: Callable[[str], Path], folder: Path) -> None:
    found = cotune("predict", str(base_model("bert")), "--chat", "hello", "--json")
    assert json.loads(found.out)["error"]["code"] == "model.no_chat_template"
    assert cotune("predict", str(base_model("bert")), "--chat", "--file", "x.csv").code == 2
