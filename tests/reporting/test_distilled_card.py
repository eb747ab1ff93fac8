"""The card of a distilled language model: what it quotes, and what it never lets through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.reporting.distilled_card import distilled_card, promises_privacy, read_privacy

FIGURES = {"loss": 2.5, "perplexity": 12.2, "accuracy": 0.4}
FOUND: dict[str, Any] = {
    "task": "causal-lm",
    "teachers": [{"model": "org/big", "sha256": "a" * 64}, {"model": "/nowhere/second", "sha256": "b" * 64}],
    "student": {"base": "org/small", "sha256": "c" * 64},
    "tokenizer": "d" * 64,
    "inputs": {"count": 200, "sha256": "e" * 64, "source": "a page", "license": "CC0-1.0"},
    "weights": [0.75, 0.25],
    "written": None,
    "max_length": 128,
    "train": "full",
    "loss": "kl",
    "temperature": 2.0,
    "label_weight": 0.25,
    "epochs": 3,
    "records": 180,
    "held_out": {"records": 20, "teacher": FIGURES, "student": FIGURES, "before": {"student": FIGURES}},
}
PROMISE = "Record-level differential privacy: ε at most 8 at δ = 1e-05."


def card_with(folder: Path, privacy: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"# A model\n\n## Privacy\n\n{privacy}\n\n## Test\n\nfigures\n", encoding="utf-8")
    return folder


def test_a_promise_is_quoted_and_its_lack_is_said(tmp_path: Path) -> None:
    said = [read_privacy(card_with(tmp_path / "one", PROMISE)), read_privacy(tmp_path / "none")]
    assert said == [PROMISE, ""]
    card = distilled_card("student", FOUND, said)
    assert "Teacher org/big, as its model card says: Record-level differential privacy: ε at most 8" in card
    assert "Teacher second: no model card in its folder says anything about privacy" in card
    for fact in ("a page", "CC0-1.0", *(letter * 64 for letter in "abcde"), "T = 2", "weight 0.75", "0.25 · cross-entropy"):
        assert fact in card


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (PROMISE, True),
        ("what it sends is (ε, δ)-differentially private", True),
        ("No differential privacy for records: the plan says privacy = none. The model may reveal single records.", False),
        ("We take privacy seriously.", False),
        ("", False),
    ],
)
def test_only_a_promise_counts_as_one(tmp_path: Path, said: str, expected: bool) -> None:
    quoted = read_privacy(card_with(tmp_path / "model", said))
    assert promises_privacy(quoted) is expected
    card = distilled_card("student", {**FOUND, "teachers": FOUND["teachers"][:1]}, [quoted])
    assert ("without differential privacy" in card) == (bool(said) and not expected)


def test_a_strangers_card_cannot_add_to_ours(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> | [link](http://x) `code`\n# Heading\n" + "long " * 500
    quoted = read_privacy(card_with(tmp_path / "model", evil))
    card = distilled_card("a\n# b <b>", {**FOUND, "teachers": FOUND["teachers"][:1]}, [quoted])
    assert "<script>" not in card
    assert "<b>" not in card
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        "# a \\# b \\<b\\>",
        "## How to use",
        "## Model",
        "## Privacy",
        "## Test",
    ]
    assert len(card) < 5000


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"## Privacy", b"## Test\n## Privacy\n## Test\n"])
def test_a_damaged_card_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert read_privacy(tmp_path) == ""


def test_what_teachers_wrote_is_named() -> None:
    card = distilled_card("student", {**FOUND, "written": 64, "label_weight": 1.0}, [PROMISE, PROMISE])
    assert "written by each teacher, of at most 64 tokens" in card
    assert "| loss | 1 · cross-entropy to the target, mean" in card
