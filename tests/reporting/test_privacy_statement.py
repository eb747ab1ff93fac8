from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from cotune.privacy.config import RecordPrivacy
from cotune.reporting import privacy_statement as statements
from cotune.reporting.privacy_statement import statement


def stated(text: str) -> float:
    found = re.search(r"ε at most (\d+\.\d\d) of", text)
    assert found
    return float(found[1])


def test_without_privacy_the_statement_says_so() -> None:
    (text,) = statement(None, {})
    assert text.startswith("No differential privacy")
    assert "neither clipped nor noised" in text
    assert "ε" not in text


def test_the_largest_epsilon_is_stated() -> None:
    """Records of different organizations are disjoint: the maximum counts, not the sum."""
    text = " ".join(statement(RecordPrivacy(epsilon=8.0), {"a": (2.5, 1e-5), "b": (7.25, 1e-4), "c": (0.5, 1e-6)}))
    assert stated(text) == 7.25
    assert "of 8 allowed" in text
    assert "δ = 1/n^1.5" in text


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.floats(1e-3, 100.0), st.just(1e-5)), min_size=1))
def test_the_stated_epsilon_is_never_below_the_true_one(spent: dict[str, tuple[float, float]]) -> None:
    true = max(epsilon for epsilon, _ in spent.values())
    assert true - 1e-9 <= stated(" ".join(statement(RecordPrivacy(epsilon=100.0), spent))) < true + 0.0101


def test_the_statement_names_its_conditions() -> None:
    text = " ".join(statement(RecordPrivacy(epsilon=3.0, delta=1e-6, clip_norm=0.5), {"a": (2.0, 1e-6)}))
    for part in (
        "adding or removing",
        "Poisson",
        "norm 0.5",
        "every round",
        "floating-point",
        "same person",
        "δ = 1e-06",
    ):
        assert part in text


def test_what_was_told_in_clear_is_not_covered() -> None:
    said = " ".join(statement(RecordPrivacy(), {"clinic": (1.0, 1e-5)}, clear_metrics=True))
    assert "does not cover: the local metrics, which organizations told as they are, without noise; the number" in said
    assert "local metrics" not in " ".join(statement(RecordPrivacy(), {"clinic": (1.0, 1e-5)}))


def test_clipping_per_layer_is_said() -> None:
    said = " ".join(statement(RecordPrivacy(clipping="per_layer"), {"clinic": (1.0, 1e-5)}))
    assert "clipped to the norm 1, in equal shares for each parameter tensor; Gaussian noise" in said


def test_of_a_real_run_it_says_what_was_stated_and_by_how_many() -> None:
    text = " ".join(statements.stated(RecordPrivacy(epsilon=8.0), {"a": 2.491, "b": 1.0}, silent=1))
    assert "the highest stated is 2.50; 1 of 3 stated nothing" in text
    assert "ε at most 8 and δ = 1/n^1.5" in text
    assert "cannot check it" in text
    assert "none was stated." in " ".join(statements.stated(RecordPrivacy(), {}, silent=3))
    assert statements.stated(None, {}) == statement(None, {})
