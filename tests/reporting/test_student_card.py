"""The card of a distilled student: which of the two it is, what distilling has cost, and where it was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.ensembles.resumable_distillation import Distilled
from cotune.reporting.student_card import student_card

MEASURED: dict[str, Any] = {
    "answers": 80,
    "agreement": 0.9125,
    "agreement_interval": [0.83, 0.956],
    "kl": 0.0512,
    "teacher_accuracy": None,
    "student_accuracy": None,
    "accuracy_difference": None,
    "difference_interval": None,
}
JUDGED = {
    **MEASURED,
    "teacher_accuracy": 0.77,
    "student_accuracy": 0.75,
    "accuracy_difference": -0.02,
    "difference_interval": [-0.05, 0.01],
}


def done(labels: tuple[str, ...] = ("bad", "good"), **changed: Any) -> Distilled:
    found = {
        "teachers": [{"model": "org/exact", "sha256": "a" * 64}],
        "student": {"base": "org/base", "sha256": "b" * 64},
        "inputs": {"count": 800, "sha256": "c" * 64, "source": "public tweets", "license": "CC0-1.0"},
        "labels": False,
        "train": "full",
        "loss": "kl",
        "label_weight": 0.0,
        "epochs": 3,
        "held_out": MEASURED,
        "test": None,
    }
    return Distilled({**found, **changed}, labels, "sequence-classification", 64)


def test_cost_and_origin_are_said() -> None:
    card = student_card(done())
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n")
    for part in (
        *("not the exact model", "0.912 (0.830 to 0.956)", "80 held-out", "0.051 nats", "| ε | none", "not measured"),
        *("800", "public tweets", "CC0-1.0", "a" * 64, "b" * 64, "c" * 64, "64 tokens", "bad, good", "truncation=True"),
    ):
        assert part in card, part


@pytest.mark.parametrize("place", ["held_out", "test"])
def test_accuracy_and_its_difference_are_said_where_known(place: str) -> None:
    card = student_card(done(**{place: {"source": "test.csv", **JUDGED}}))
    assert "exact 0.770, this one 0.750: difference -0.020 (-0.050 to +0.010), 80 answers" in card
    assert "not measured" not in card
    assert ("test.csv" in card) == (place == "test")


def test_what_was_not_stated_is_said_to_be_so() -> None:
    card = student_card(done(inputs={"count": 10, "sha256": "c", "source": "", "license": ""}))
    assert "source: not stated; license: not stated" in card


def test_several_teachers_are_told_from_one() -> None:
    teachers = [{"model": name, "sha256": name} for name in ("org/one", "org/two")]
    assert "what 2 exact models predict, in the mean, for" in student_card(done(teachers=teachers))
    assert "what the exact model predicts for" in student_card(done())


def test_nobody_writes_markdown_or_html_into_the_card() -> None:
    evil = "x](http://evil) <b>\n\n# free |"
    found = done(("a\n| b", "<script>"), inputs={"count": 10, "sha256": "c", "source": evil, "license": evil})
    card = student_card(found).split("---\n", 2)[2]
    for part in ("<script>", "<b>", "\n# free", "[x](", "x](http"):
        assert part not in card, part
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {3}


def test_where_models_are_on_a_machine_is_not_said(tmp_path: Path) -> None:
    place = tmp_path / "secret" / "tweets"
    card = student_card(done(teachers=[{"model": str(place), "sha256": "a"}], student={"base": str(place), "sha256": "b"}))
    assert "tweets" in card
    assert "secret" not in card
