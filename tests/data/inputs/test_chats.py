"""Chats as files hold them: JSON lines, Parquet and JSON in CSV, and what is left out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.config import DataConfig
from cotune.data.inputs.chats import read_asked, read_chat
from cotune.data.record_reading import read_records
from cotune.data.types import Chat, Passage, content_bytes, record_identity
from cotune.data.unlabeled import read_typed, read_unlabeled
from tests.support.chats import said

CHATS = [said("how?", "so"), said("a", "b", "c", "d\nd"), said("é", "ü", system="be brief")]
EXPECTED = tuple(Chat(tuple((m["role"], m["content"]) for m in chat)) for chat in CHATS)


def write(file: Path, rows: list[Any]) -> Path:
    if file.suffix == ".parquet":
        pd.DataFrame({"talk": rows}).to_parquet(file)
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["talk"], *([json.dumps(row)] for row in rows)])
    else:
        file.write_text("".join(json.dumps({"talk": row}) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_chats_are_the_same_from_every_format(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"talks{suffix}", CHATS)
    assert read_records(DataConfig(source=str(file), messages="talk"), task="causal-lm").inputs == EXPECTED


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_one_chat_is_no_table(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"talk{suffix}", CHATS[1:2])
    assert read_records(DataConfig(source=str(file), messages="talk"), task="causal-lm").inputs == EXPECTED[1:2]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "blank chat"),
        (float("nan"), "blank chat"),
        ([], "blank chat"),
        (" ", "blank chat"),
        ("hello", "unreadable chat"),
        ("[" * 100_000, "unreadable chat"),
        (3, "unreadable chat"),
        ({"role": "user", "content": "a"}, "unreadable chat"),
        ([["user", "a"]], "unreadable chat"),
        ([{"role": "user"}], "unreadable chat"),
        ([{"role": "user", "content": ["a"]}], "unreadable chat"),
        ([{"role": "assistant", "content": "a", "tool_calls": [1]}], "chat with more than roles and contents"),
        (said("a"), "chat without an answer"),
        (said("a", " "), "blank target"),
        ([{"role": "assistant", "content": "a"}], "blank prompt"),
        (said("a\ud800", "b"), "broken Unicode"),
    ],
)
def test_what_is_no_chat_is_left_out(value: object, reason: str) -> None:
    assert read_chat(value) == reason


def test_keys_without_a_value_are_no_more_keys() -> None:
    """A table has a column for every key that some message has."""
    assert read_chat([{**message, "name": None} for message in CHATS[0]]) == EXPECTED[0]


def test_what_follows_the_last_answer_is_not_read() -> None:
    assert read_chat(said("a", "b", "thanks")) == Chat((("user", "a"), ("assistant", "b")))
    assert read_asked(said("a", "b", "thanks")) == Chat((("user", "a"), ("assistant", "b"), ("user", "thanks")))
    assert read_asked(said("a", "b")) == Chat((("user", "a"),))


def test_typed_text_is_what_a_user_says() -> None:
    found = read_typed(["hello", " "], "causal-lm", chats=True)
    assert [(row.shown, row.given, row.reason) for row in found] == [
        ("hello", Chat((("user", "hello"),)), ""),
        ("record 2", None, "blank chat"),
    ]


def test_every_row_of_a_file_is_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "talks.jsonl", [*CHATS, [], said("a")])
    found = read_unlabeled(file, "causal-lm", column="talk", chats=True)
    assert [row.given and len(row.given.messages) for row in found if isinstance(row.given, Chat | None)] == [1, 3, 2, None, 1]


@pytest.mark.parametrize(
    "others", [{"prompt": "p", "target": "t"}, {"text": "t"}, {"separator": " "}, {"unit": "talk"}, {"messages": ""}]
)
def test_columns_that_cannot_be_together_are_refused(others: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="messages|chat"):
        DataConfig.model_validate({"source": "x.jsonl", "messages": "talk", **others})


MESSAGES = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=5)), min_size=1, max_size=4).map(tuple)


@given(MESSAGES, MESSAGES)
def test_content_tells_chats_apart(one: tuple[tuple[str, str], ...], other: tuple[tuple[str, str], ...]) -> None:
    assert (content_bytes(Chat(one)) == content_bytes(Chat(other))) == (one == other)


def test_identity_of_a_chat_is_that_of_its_two_columns() -> None:
    """A ledger knows a record again that was given as a prompt and a target before."""
    assert record_identity(EXPECTED[0]) == record_identity(Passage("How?\n", "so."))
    assert record_identity(EXPECTED[0]) != record_identity(EXPECTED[1])
