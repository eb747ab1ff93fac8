"""Entities against the examples of the seqeval package's documentation, and against spans that tags were made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.models.evaluation.quality import entity_quality, find_entities


def test_the_example_of_seqeval() -> None:
    """Its README: F1 0.50 over all; MISC 0, PER 1."""
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predicted = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = entity_quality(truth, predicted)
    assert found["micro"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert found["macro"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert [(each["type"], each["f1"], each["entities"]) for each in found["types"]] == [("MISC", 0.0, 1), ("PER", 1.0, 1)]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], [("PER", 0, 1), ("LOC", 3, 3)]),
        (["B-PER", "B-PER"], [("PER", 0, 0), ("PER", 1, 1)]),
        (["I-PER", "I-PER", "I-LOC"], [("PER", 0, 1), ("LOC", 2, 2)]),  # I- begins where nothing of its type goes on
        (["B-PER", "E-PER", "I-PER"], [("PER", 0, 1), ("PER", 2, 2)]),
        (["S-PER", "I-PER"], [("PER", 0, 0), ("PER", 1, 1)]),
        (["PER", "PER", "O", "LOC"], [("PER", 0, 1), ("LOC", 3, 3)]),  # without prefixes
        (["B", "I", "O", "B"], [("", 0, 1), ("", 3, 3)]),
        (["B-a-b", "I-a-b"], [("a-b", 0, 1)]),
        (["O", "O"], []),
        ([], []),
    ],
)
def test_tags_by_hand(tags: list[str], expected: list[tuple[str, int, int]]) -> None:
    assert find_entities(tags) == expected


@given(st.lists(st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 3), st.integers(0, 2)), max_size=6))
def test_spans_that_were_written_as_tags_are_found(spans: list[tuple[str, int, int]]) -> None:
    tags: list[str] = []
    expected = []
    for kind, length, gap in spans:
        expected.append((kind, len(tags), len(tags) + length - 1))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1), *["O"] * gap]
    assert find_entities(tags) == expected
    whole = entity_quality([tags], [tags])["micro"]["f1"]
    assert whole == (1.0 if spans else 0.0)
    assert entity_quality([tags], [["O"] * len(tags)])["micro"]["recall"] == 0.0
