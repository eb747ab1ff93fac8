"""A coordinator's words beside a record, a system message, an instruction or a separator, make no other record of it.

A ledger knows records again by their identity: by it, one that is in the files of two collections spends only one total. A plan
that could change it would get both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from tests.support.chats import said

PAIRS = [(f"what is {i}, and why?", f"answer {i}") for i in range(5)]
WORDINGS: list[dict[str, Any]] = [
    {},
    {"separator": " = "},
    {"separator": " The answer is: "},
    {"instruction": "Answer."},
    {"instruction": "Answer the question of"},
    {"system": ""},
    {"system": "You answer."},
    {"system": "You answer.", "instruction": "Answer."},
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"asked": asked, "said": answer}) + "\n" for asked, answer in PAIRS), encoding="utf-8")
    return file


def identities(source: Path, **columns: str) -> list[bytes]:
    config = DataConfig.model_validate({"source": str(source), **columns})
    return list(read_records(config, task="causal-lm").identities)


@pytest.mark.parametrize("wording", WORDINGS, ids=str)
def test_no_wording_makes_a_record_new(pairs: Path, tmp_path: Path, wording: dict[str, Any]) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": said(*pair)}) + "\n" for pair in PAIRS), encoding="utf-8")
    found = identities(pairs, prompt="asked", target="said", **wording)
    assert len(set(found)) == len(PAIRS)
    assert found == identities(chats, messages="messages")
    if "system" in wording:
        assert found == identities(chats, messages="messages", system=wording["system"])


def test_words_of_the_organization_make_another_record(pairs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"asked": f"{a} please", "said": b}) + "\n" for a, b in PAIRS), encoding="utf-8")
    columns = {"prompt": "asked", "target": "said", "instruction": "Answer."}
    assert not set(identities(pairs, **columns)) & set(identities(other, **columns))
