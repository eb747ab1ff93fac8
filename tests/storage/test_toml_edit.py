from __future__ import annotations

from cotune.storage.json_documents import parse_toml
from cotune.storage.toml_edit import edit_toml

BEFORE = """\
# reviewed on 2026-11-02 by the board
[training]  # what may be trained
max_rounds   = 20   # agreed with legal

base_models = [
    "aa",  # the small one
]

[budget]
own_epsilon = 3.0
"""


def test_comments_order_and_formatting_stay() -> None:
    after = edit_toml(BEFORE, {"training": {"max_rounds": 50}})
    assert after == BEFORE.replace("max_rounds   = 20 ", "max_rounds   = 50 ")


def test_missing_keys_and_tables_are_added() -> None:
    after = edit_toml(BEFORE, {"budget": {"delta": 1e-6}, "disclosures": {"loss": True}})
    assert after.startswith(BEFORE)
    assert after.removeprefix(BEFORE).split() == ["delta", "=", "1e-06", "[disclosures]", "loss", "=", "true"]


def test_a_key_of_the_document_is_added_before_its_tables() -> None:
    after = edit_toml('name = "a"\n[quotas]\nreply = 1\n', {"id": "b"})
    assert parse_toml(after) == {"name": "a", "id": "b", "quotas": {"reply": 1}}


def test_none_removes_a_key() -> None:
    assert edit_toml("a = 1  # one\nb = 2\n", {"a": None}) == "b = 2\n"
