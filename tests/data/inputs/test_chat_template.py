"""Chats written out by a template: which tokens are targets, and what a hostile template can do."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cotune.data.inputs import chat_template
from cotune.data.inputs.chat_template import check_chat_template, end_tokens, write_chats
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.task import get_task
from cotune.data.types import Chat
from cotune.errors import ModelError
from cotune.worker_process import WorkerProcess
from tests.support.chats import CLOSING, TEMPLATES, byte_tokenizer, said
from tests.support.failures import fails_with

TASK = get_task("causal-lm")
CHATML = TEMPLATES["chatml"]
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<>[]"), max_size=20)
ANSWERS = WORDS.filter(str.strip)
NEW_INTERPRETER = chat_template._new_process  # before a fixture of the session replaces it


def chat(*contents: str, system: str = "") -> Chat:
    return Chat(tuple((message["role"], message["content"]) for message in said(*contents, system=system)))


def targets_of(reader: Any, example: dict[str, Any]) -> str:
    return str(reader.decode([label for label in example["labels"] if label != IGNORED]))


# --- which tokens are targets


@settings(max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # a process is started for each list
@given(st.lists(st.tuples(st.lists(st.tuples(WORDS, ANSWERS), max_size=2), WORDS, ANSWERS), min_size=1, max_size=40))
@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_are_exactly_the_last_answer(name: str, told: list[tuple[list[tuple[str, str]], str, str]]) -> None:
    """And the token that ends its turn; of templates that trim, without the white space around."""
    reader = byte_tokenizer(TEMPLATES[name])
    records = [chat(*(part for turn in before for part in turn), asked, answer) for before, asked, answer in told]
    examples = TASK.examples(reader, 4096, records, [0] * len(records))
    for record, example in zip(records, examples, strict=True):
        content = record.answer or ""
        target = targets_of(reader, example)
        if name in ("llama", "gemma"):
            assert target == content.strip() + CLOSING[name]
        elif name == "chatml":
            assert target == content + CLOSING[name]
        else:
            assert target.removesuffix(CLOSING[name]).strip() == content.strip()
            assert target.endswith(CLOSING[name])
        first = next(place for place, label in enumerate(example["labels"]) if label != IGNORED)
        assert all(label != IGNORED for label in example["labels"][first:]), "they stand at the end"


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_read_is_what_transformers_writes(name: str) -> None:
    """Against `apply_chat_template`, which knows nothing of prompts and targets."""
    reader = byte_tokenizer(TEMPLATES[name])
    messages = said("a b", "c d", "e?", "f g")
    [example] = TASK.examples(reader, 4096, [chat("a b", "c d", "e?", "f g")], [0])
    whole = reader.apply_chat_template(messages, tokenize=False).rstrip() + ("</s>" if name == "plain" else "")
    assert [*example["input_ids"], example["labels"][-1]] == reader(whole, add_special_tokens=False)["input_ids"]
    prompt = reader.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert TASK.prompts(reader, 4096, [chat("a b", "c d", "e?")]) == [reader(prompt, add_special_tokens=False)["input_ids"]]


def test_answers_end_with_the_token_of_a_turn() -> None:
    for name, closing in CLOSING.items():
        reader = byte_tokenizer(TEMPLATES[name])
        assert set(end_tokens(reader)) == {reader.eos_token_id, reader.convert_tokens_to_ids(closing)}


def test_system_message_is_prompt_or_a_chat_that_the_template_refuses() -> None:
    record = chat("a", "b", system="be brief")
    llama = byte_tokenizer(TEMPLATES["llama"])
    [example] = TASK.examples(llama, 4096, [record], [0])
    assert targets_of(llama, example) == "b<|eot_id|>"
    assert "be brief" in llama.decode(example["input_ids"])
    gemma = byte_tokenizer(TEMPLATES["gemma"])
    examples = TASK.examples(gemma, 4096, [chat("a", "b"), record], [0, 0])
    assert [targets_of(gemma, each) for each in examples] == ["b<end_of_turn>", ""]
    assert TASK.refused(gemma, [chat("a", "b"), record]) == 1


def test_cut_answers_are_counted_and_contribute_nothing() -> None:
    reader = byte_tokenizer(CHATML)
    records = [chat("a", "b"), chat("a" * 50, "b"), chat("a", "b" * 50)]
    examples = TASK.examples(reader, 40, records, [0] * 3)
    assert [any(label != IGNORED for label in each["labels"]) for each in examples] == [True, False, True]
    assert (TASK.cut(reader, 40, records), TASK.lost(reader, 40, records)) == (2, 1)


# --- templates of strangers


def refusal(template: str | None) -> str:
    with pytest.raises(ModelError) as raised:
        check_chat_template(byte_tokenizer(template))
    return raised.value.code


@pytest.mark.parametrize(
    ("name", "system", "refused"),
    [
        *((name, "be brief", name in ("gemma", "mistral")) for name in TEMPLATES),
        ("chatml", "", False),
        ("gemma", "", True),
    ],
)
def test_a_template_must_write_the_system_message(name: str, system: str, refused: bool) -> None:
    """That of Gemma raises an error, that of Mistral 7B (v0.1) leaves it out, so that a plan would not mean what it says."""
    with fails_with("model.no_system_message") if refused else nullcontext():
        check_chat_template(byte_tokenizer(TEMPLATES[name]), system)


WITH_SYSTEM = {  # what templates can do to chats that begin with a system message, and to no others
    "leaves out": (TEMPLATES["mistral"], "a"),  # which stands in the user's question
    "other prompt": ("{% if messages[0].role == 'system' and not add_generation_prompt %}X{% endif %}" + CHATML, "be brief"),
    "other answer": (
        CHATML.replace("m.content", "(m.content | upper if messages[0].role == 'system' else m.content)"),
        "BE BRIEF",
    ),
    "no question": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{{ messages[-1].content if not add_generation_prompt }}"
        "{% else %}" + CHATML + "{% endif %}",
        "be brief",
    ),
    "no long chats": (
        "{% if messages[0].role == 'system' and messages | length > 3 %}{{ raise_exception('no') }}{% endif %}" + CHATML,
        "be brief",
    ),
}


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_template_must_write_answers_below_the_system_message(name: str) -> None:
    """Else all records of all organizations would contribute nothing, or not what the plan says, and be charged."""
    template, system = WITH_SYSTEM[name]
    check_chat_template(byte_tokenizer(template))
    with fails_with("model.no_system_message"):
        check_chat_template(byte_tokenizer(template), system)


HOSTILE = {
    "class": "{{ ''.__class__ }}" + CHATML,
    "class by index": "{{ ''['__class__'] }}" + CHATML,
    "class by filter": "{{ '' | attr('__cl' ~ 'ass__') }}" + CHATML,
    "class by format": "{{ '{0.__class__}'.format(messages) }}" + CHATML,
    "include": "{% include '/etc/passwd' %}" + CHATML,
    "import": "{% import 'os' as os %}" + CHATML,
    "extends": "{% extends 'base' %}",
    "chance": "{{ [1, 2] | random }}" + CHATML,
    "changes messages": "{{ messages.append(1) }}" + CHATML,
    "syntax": "{% for m in messages %}",
    "deep": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "says nothing": "",
    "says no answer": "{{ messages[0].content }}",
    "other prompt": "{% if add_generation_prompt %}ask: {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused(name: str) -> None:
    assert refusal(HOSTILE[name]) == "model.unusable_chat_template"


LIMITS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 7 ** 300000000 % 7 }}{{ messages[0].content }}",
    "ten gigabytes": "{{ 'a' * 10000000000 }}" + CHATML,
    "gigabytes at run time": "{{ messages[0].content * 500000000 }}" + CHATML,
    "format": "{{ '%09999999999d' % 3 }}" + CHATML,
    "output": "{% for m in messages %}{{ m.content * 500000 }}{% endfor %}",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long if name == "power" else ()) for name in LIMITS])
def test_template_that_takes_too_much_is_refused(name: str) -> None:
    assert refusal(LIMITS[name]) == "model.chat_template_limit"


def test_template_by_which_the_process_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by "power", in less time."""
    monkeypatch.setattr(chat_template, "_ask", lambda process, each: os.kill(process.pid, signal.SIGXCPU))
    assert refusal("{# ends #}" + CHATML) == "model.chat_template_limit"


@pytest.mark.parametrize(
    ("name", "code"), [("gigabytes at run time", "chat_template_limit"), ("class", "unusable_chat_template")]
)
def test_new_interpreter_has_the_same_limits(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests fork the process that writes chats."""
    monkeypatch.setattr(chat_template, "_new_process", NEW_INTERPRETER)
    assert refusal("{# new #}" + {**LIMITS, **HOSTILE}[name]) == f"model.{code}"


def test_base_without_a_template_is_refused() -> None:
    assert refusal(None) == "model.no_chat_template"


def test_template_that_refuses_one_chat_leaves_the_others_alone() -> None:
    """Also where the process ends by it: what a record does to the template is nothing to other records."""
    evil = "{% if messages[0].content == 'bad' %}{{ 7 ** (messages | length * 300000000) % 7 }}{% endif %}" + CHATML
    records = [chat("a", "b"), chat("bad", "b"), chat("c", "d")]
    found = write_chats(byte_tokenizer(evil), records)
    plain = write_chats(byte_tokenizer(CHATML), records)
    assert found == [plain[0], None, plain[2]]


def test_every_day_is_the_same_day() -> None:
    dated = "{% if add_generation_prompt or not add_generation_prompt %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML
    [written] = write_chats(byte_tokenizer(dated), [chat("a", "b")])
    assert written
    assert written.prompt.startswith("26 Jul 2024<|im_start|>")


# --- the process


def test_each_chat_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = byte_tokenizer("{# once #}" + CHATML)
    check_chat_template(reader)
    asked: list[Chat] = []
    ask = chat_template._ask
    monkeypatch.setattr(chat_template, "_ask", lambda process, each: asked.append(each) or ask(process, each))
    records = [chat("once", str(number)) for number in range(5)]
    for _ in range(2):
        TASK.examples(reader, 64, records, [0] * 5)
        TASK.cut(reader, 64, records)
    assert asked == records


def test_kept_chats_count_by_their_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = byte_tokenizer("{# bounded #}" + CHATML)
    chat_template._kept.clear()
    [first, *_] = write_chats(reader, [chat("a", "first"), chat("b", "second")])
    assert chat_template._kept.size > 2 * len("first")
    monkeypatch.setattr(chat_template._kept, "max_size", 1)
    write_chats(reader, [chat("c", "third")])
    assert (first,) not in chat_template._kept.values()
    assert len(chat_template._kept) == 1


@pytest.mark.crash
def test_killed_process_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = byte_tokenizer("{# killed #}" + CHATML)
    check_chat_template(reader)
    killed: list[int] = []
    ask = chat_template._ask

    def kill_first(process: subprocess.Popen[bytes], each: Chat) -> Any:
        if not killed:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
        return ask(process, each)

    monkeypatch.setattr(chat_template, "_ask", kill_first)
    [written] = write_chats(reader, [chat("a", "killed")])
    assert written
    assert killed


def _write_in_a_worker(pipe: Any) -> None:
    pipe.send(write_chats(byte_tokenizer(CHATML), [chat("a", "b")]))


def test_process_that_trains_may_write_chats() -> None:
    """It is a daemon of multiprocessing, which may start no process of its kind."""
    worker = WorkerProcess(_write_in_a_worker)
    try:
        assert worker.pipe.recv() == write_chats(byte_tokenizer(CHATML), [chat("a", "b")])
    finally:
        worker.kill()
