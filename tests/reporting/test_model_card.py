from __future__ import annotations

from pathlib import Path

import pytest

from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.reporting.model_card import model_card, promised


def plan(**tables: object) -> Plan:
    return parse_plan(
        {"name": "toy", "model": {"base": "org/base"}, "data": {"source": "x.csv"}, "labels": ["bad", "good"], **tables}
    )


def body(text: str) -> str:
    """Without the front matter."""
    return text.split("---\n", 2)[2]


def test_what_is_needed_to_serve_and_to_judge_a_model_is_said() -> None:
    found = plan(privacy={"epsilon": 3.0})
    card = model_card(
        found,
        privacy=promised(found),
        length=64,
        test={"this model": {"accuracy": 0.8125, "precision": 0.5, "recall": 0.25, "f1": 1 / 3}, "pooled": None},
        examples=1234,
    )
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n")
    for part in ("bad, good", "64 tokens", "org/base", found.plan_id, "truncation=True", "ε at most 3 ", "1,234", "0.812"):
        assert part in card
    assert "pooled" not in card


@pytest.mark.parametrize("adapters", [False, True])
def test_a_base_in_four_bits_is_named(adapters: bool) -> None:
    """With what loads it, on the card of adapters alone."""
    causal = {"task": "causal-lm", "labels": [], "train": "lora", "data": {"source": "x.csv", "prompt": "p", "target": "t"}}
    cards = [
        model_card(plan(**causal, model={"base": "org/base", "quantization": q}), privacy=["p"], length=64, adapters=adapters)
        for q in ("nf4", "none")
    ]
    assert ["in 4 bits" in card for card in cards] == [True, False]
    assert ["load_in_4bit=True" in card for card in cards] == [True, False]
    assert ["merge_and_unload" in card for card in cards] == [False, adapters]


def test_without_privacy_it_says_so() -> None:
    found = plan(privacy="none")
    assert "may reveal single records" in model_card(found, privacy=promised(found), length=64)


def test_names_cannot_write_markdown_or_html() -> None:
    evil = plan(labels=["<script>alert(1)</script>", "a|b\n\n# free\u202e", "[x](http://evil)", "`code`"])
    card = body(model_card(evil, privacy=["p"], length=64))
    assert "<script>" not in card
    assert "\n# free" not in card
    assert "\u202e" not in card
    assert "[x](" not in card
    [row] = [line for line in card.splitlines() if line.startswith("| labels ")]
    assert row.replace("\\|", "").count("|") == 3


def test_where_a_base_model_is_on_a_machine_is_not_said(tmp_path: Path) -> None:
    card = model_card(plan(model={"base": str(tmp_path / "secret" / "minilm")}), privacy=["p"], length=64)
    assert "minilm" in card
    assert "secret" not in card
    assert str(tmp_path) not in card
