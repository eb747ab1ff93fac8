"""Metrics of written texts: against hand-computed figures and the libraries' own defaults."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.data.metrics import text_metrics
from cotune.data.metrics.text_metrics import check_text_metrics, compare_texts, exact_match, rouge_l
from tests.support.failures import fails_with

pytest.importorskip("rouge_score")
pytest.importorskip("sacrebleu")

WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "größe", "日本"]), max_size=8)


def test_equal_texts_have_all_of_everything() -> None:
    texts = ["the cat sat on the mat", "a dog came by in the rain"]
    assert set(compare_texts(texts, texts).as_dict().values()) == {1.0}


def test_unlike_texts_have_nothing() -> None:
    assert compare_texts(["the cat sat"], ["xyz"]).as_dict() == {"exact_match": 0, "rouge_l": 0, "chrf": 0, "bleu": 0}


def test_an_empty_text_counts_as_one_told_wrong() -> None:
    found = compare_texts(["the cat sat down", "the cat sat down"], ["the cat sat down", ""])
    assert found.exact_match == 0.5
    assert found.rouge_l == 0.5
    assert 0 < found.chrf < 1


def test_rouge_l_by_hand() -> None:
    # the longest common subsequence of "police killed the gunman" and "police kill the gunman" has three words of four each
    assert rouge_l(["police killed the gunman"], ["police kill the gunman"]) == pytest.approx([0.75])
    # two of three words, two of six: F = 2 · (2/6) · (2/3) / (2/6 + 2/3)
    assert rouge_l(["the gunman police"], ["the big bad gunman fled away"]) == pytest.approx([4 / 9])


def test_letters_of_other_languages_are_words() -> None:
    assert rouge_l(["größe über alles"], ["größe über"]) == pytest.approx([0.8])
    assert rouge_l(["日本 語"], ["日本"]) == pytest.approx([2 / 3])


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="abc XYZ09.,-", max_size=30), st.text(alphabet="abc XYZ09.,-", max_size=30))
def test_english_texts_have_the_figures_of_the_library(reference: str, written: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(["rougeL"]).score(reference, written)["rougeL"].fmeasure
    assert rouge_l([reference], [written]) == [expected]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_every_figure_is_a_share(pairs: list[tuple[list[str], list[str]]]) -> None:
    found = compare_texts([" ".join(one) for one, _ in pairs], [" ".join(other) for _, other in pairs])
    assert all(0 <= value <= 1 for value in found.as_dict().values())


def test_white_space_makes_no_difference() -> None:
    assert exact_match("a cat\n", "a  cat")
    assert not exact_match("a cat", "A cat")


def test_lists_of_unlike_lengths_are_refused() -> None:
    for references, written in ((["a"], []), ([], [])):
        with pytest.raises(ValueError, match="as many"):
            compare_texts(references, written)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "_LIBRARIES", ("no_such_library",))
    with fails_with("data.no_text_metrics", "no_such_library") as raised:
        check_text_metrics()
    assert raised.value.code == "data.no_text_metrics"
