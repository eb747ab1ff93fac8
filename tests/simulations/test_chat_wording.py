"""Prompts with a system message or an instruction: what chats of the same words are, wherever they are read."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from cotune.cli.models.generated_texts import complete_prompt
from cotune.data.config import DataConfig
from cotune.data.inputs.chat_wording import ChatWording
from cotune.data.record_reading import read_records
from cotune.data.types import Chat, Passage
from cotune.errors import PlanError
from cotune.plan.load import parse_plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.reporting.model_card import model_card
from tests.support.chats import TEMPLATES, said, write_chat_model
from tests.support.console import Cotune, Outcome, _logging_as_it_was, cotune, folder
from tests.support.failures import fails_with

__all__ = ["_logging_as_it_was", "cotune", "folder"]  # fixtures

BRIEF = "Be brief."
SAY = 'Write a "short" title:\nin English'
PAIRS = [("a parser of XML", "XML parser"), ("  spaces stay ", "one"), *((f"game {i}", f"maze {i}") for i in range(8))]
PREDICT = ("--max-new-tokens", "4", "--json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture
def pairs(folder: Path) -> Path:
    """Prompts and targets, two of which cannot be used."""
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("long", "short"), *PAIRS, (" ", "no prompt"), ("no target", "")])
    return folder / "pairs.csv"


def write_chats(file: Path, *, system: str = "", instruction: str | None = SAY) -> Path:
    """The same as chats."""
    above = "" if instruction is None else f"{instruction}\n\n"
    rows = [{"messages": said(f"{above}{prompt}", target, system=system)} for prompt, target in PAIRS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def chats(folder: Path) -> Path:
    """With all words that are said beside the records."""
    return write_chats(folder / "chats.jsonl", system=BRIEF)


@pytest.fixture
def instructed(folder: Path) -> Path:
    """Without the system message."""
    return write_chats(folder / "instructed.jsonl")


@pytest.mark.parametrize("words", [{"instruction": SAY}, {"system": BRIEF}, {"system": BRIEF, "instruction": SAY}])
def test_pairs_are_read_as_chats(pairs: Path, tmp_path: Path, words: dict[str, str]) -> None:
    complete = write_chats(tmp_path / "chats", system=words.get("system", ""), instruction=words.get("instruction"))
    complete.rename(tmp_path / "complete.jsonl")
    config = DataConfig(source=str(pairs), prompt="long", target="short", **words)
    found = read_records(config, task="causal-lm")
    expected = read_records(DataConfig(source=str(tmp_path / "complete.jsonl"), messages="messages"), task="causal-lm")
    assert found.inputs == expected.inputs
    assert dict(found.skipped) == {"blank prompt": 1, "blank target": 1}


def test_chats_begin_with_the_system_message_of_the_plan_or_their_own(chats: Path, instructed: Path) -> None:
    own = read_records(DataConfig(source=str(chats), messages="messages"), task="causal-lm")
    given = read_records(DataConfig(source=str(instructed), messages="messages", system=BRIEF), task="causal-lm")
    assert given.inputs == own.inputs
    kept = read_records(DataConfig(source=str(chats), messages="messages", system="Say much."), task="causal-lm")
    assert kept.inputs == own.inputs


def test_the_prompt_is_found_below_its_instruction() -> None:
    words = ChatWording("be brief", SAY)
    assert words.prompt_of(words.ask("a\n\nb", "c")) == "a\n\nb"
    assert ChatWording().prompt_of(words.ask("a")) == f"{SAY}\n\na"


def test_commands_read_pairs_as_they_read_chats(base: Path, pairs: Path, chats: Path, instructed: Path, cotune: Cotune) -> None:
    evaluate = ("evaluate", str(base), "--max-length", "128", "--json", "--data")
    words = ("--instruction", SAY, "--system", BRIEF)
    columns = ("--prompt", "long", "--target", "short", *words)
    found = json.loads(cotune(*evaluate, str(pairs), *columns).out)
    assert found["figures"] == json.loads(cotune(*evaluate, str(chats), "--messages", "messages").out)["figures"]
    told = json.loads(cotune("predict", str(base), "--file", str(pairs), "--text", "long", *words, *PREDICT).out)
    answered = json.loads(cotune("predict", str(base), "--file", str(chats), "--messages", "messages", *PREDICT).out)
    assert [row["text"] for row in told[:10]] == [row["text"] for row in answered]
    begun = (str(instructed), "--messages", "messages", "--system", BRIEF)
    assert found["figures"] == json.loads(cotune(*evaluate, *begun).out)["figures"]
    assert answered == json.loads(cotune("predict", str(base), "--file", *begun, *PREDICT).out)
    assert [row["input"] for row in told[:10]] == [prompt for prompt, _ in PAIRS], "without the instruction"
    assert told[10]["reason"] == "blank prompt"


def test_a_student_learns_from_pairs_what_it_learns_from_chats(
    base: Path, pairs: Path, chats: Path, cotune: Cotune, folder: Path
) -> None:
    call = ("distill", str(base), "--student", str(base), "--epochs", "1", "--max-length", "128", "--json")
    columns = ("--prompt", "long", "--target", "short", "--instruction", SAY, "--system", BRIEF)
    first = cotune(*call, "--data", str(pairs), *columns, "--out", str(folder / "one"))
    second = cotune(*call, "--data", str(chats), "--messages", "messages", "--out", str(folder / "two"))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert _inputs(first) == _inputs(second)
    assert (folder / "one" / "model.safetensors").read_bytes() == (folder / "two" / "model.safetensors").read_bytes()


def test_prompts_get_what_stands_beside_them_in_training() -> None:
    """Of `cotune predict`, and of `distill --write-targets`."""
    words = ChatWording("be brief", SAY)
    chat = Chat((("system", "be brief"), ("user", f"{SAY}\n\na")))
    assert complete_prompt(Passage("a", ""), "\n", words) == chat
    assert complete_prompt(Passage("a", ""), "\n", ChatWording()) == Passage("a\n", "")
    assert complete_prompt(chat, "\n", ChatWording()) == chat
    assert complete_prompt(Chat((("user", "a"),)), "\n", words) == Chat((("system", "be brief"), ("user", "a")))


def _inputs(found: Outcome) -> str:
    """The hash of what was learned from."""
    return str(json.loads(found.out)["inputs"]["sha256"])


@pytest.mark.parametrize("words", [{"instruction": SAY}, {"instruction": SAY, "system": BRIEF}])
def test_the_card_says_how_to_ask(base: Path, cotune: Cotune, words: dict[str, str]) -> None:
    """Its code runs, and writes what `cotune predict` does."""
    plan = parse_plan(_table(base, {"prompt": "p", "target": "t", **words}))
    card = model_card(plan, privacy=["p"], length=64)
    code = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(base)).replace("=50", "=4")
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(code, {})
    options = [part for key, value in words.items() for part in (f"--{key}", value)]
    [found] = json.loads(cotune("predict", str(base), "a prompt", *options, *PREDICT).out)
    assert told.getvalue().strip() == found["text"].strip()


def _table(base: Path, data: dict[str, Any], task: str = "causal-lm") -> dict[str, Any]:
    return {
        "name": "titles",
        "task": task,
        "train": "lora",
        "model": {"base": str(base)},
        "data": {"source": "x.csv", **data},
    }


PAIR = {"prompt": "long", "target": "short", "instruction": SAY}


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("causal-lm", {"instruction": SAY}),
        ("causal-lm", {"instruction": SAY, "messages": "messages"}),
        ("causal-lm", {**PAIR, "separator": " "}),
        ("causal-lm", {**PAIR, "instruction": ""}),
        ("seq2seq", PAIR),
        ("seq2seq", {"prompt": "long", "target": "short", "system": ""}),
        ("causal-lm", {"system": BRIEF}),
        ("causal-lm", {"system": BRIEF, "prompt": "long", "target": "short", "separator": " "}),
    ],
)
def test_impossible_wordings_are_refused(base: Path, task: str, data: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as raised:
        parse_plan(_table(base, data, task))
    assert raised.value.code == "plan.invalid"


def test_an_instruction_needs_a_chat_model(base: Path, pairs: Path, cotune: Cotune, folder: Path) -> None:
    plain = write_chat_model(folder / "plain", None)
    asked = cotune("predict", str(plain), "a prompt", "--instruction", SAY, "--json")
    assert json.loads(asked.out)["error"]["code"] == "model.no_chat_template"
    assert cotune("predict", str(base), "--chat", "a prompt", "--instruction", SAY).code == 2
    call = ("distill", str(base), "--student", str(base), "--data", str(pairs), "--out", str(folder / "new"), "--json")
    for words in (("--instruction", SAY), ("--system", BRIEF)):
        refused = cotune(*call, "--text", "long", *words)
        assert json.loads(refused.out)["error"]["code"] == "data.invalid_description"


def test_a_system_message_needs_a_template_that_writes_it(pairs: Path, cotune: Cotune, folder: Path) -> None:
    gemma = write_chat_model(folder / "gemma", TEMPLATES["gemma"])
    asked = cotune("predict", str(gemma), "a prompt", "--system", BRIEF, "--json")
    assert json.loads(asked.out)["error"]["code"] == "model.no_system_message"
    plan = parse_plan(_table(gemma, {"prompt": "long", "target": "short", "system": BRIEF}))
    with fails_with("model.no_system_message"):
        get_plan_model(plan, "cpu")


@pytest.mark.parametrize("words", [{"system": "brief " * 30}, {"instruction": "brief " * 30}, {}])
def test_words_that_leave_no_room_for_an_answer_are_refused(base: Path, words: dict[str, str]) -> None:
    """All records of all organizations would contribute nothing, and be charged; the shortest is lost with one token less."""
    columns = {"prompt": "p", "target": "t"} if words else {"messages": "m"}
    table = _table(base, {**columns, **words})
    model = get_plan_model(parse_plan({**table, "model": {"base": str(base), "max_length": 256}}), "cpu")
    shortest = ChatWording(**words).ask("a", "b")
    task, reader = model.loaded.task, model.loaded.reader
    [prompt] = task.prompts(reader, 256, [Chat(shortest.asked)])
    length = len(prompt)
    assert [task.lost(reader, most, [shortest]) for most in (length, length - 1)] == [0, 1]
    assert get_plan_model(parse_plan({**table, "model": {"base": str(base), "max_length": length}}), "cpu")
    with fails_with("model.no_room_for_chats", str(length - 1)):
        get_plan_model(parse_plan({**table, "model": {"base": str(base), "max_length": length - 1}}), "cpu")
