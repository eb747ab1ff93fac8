from __future__ import annotations

import numpy as np

from cotune.models.evaluation.predictor import class_numbers
from tests.support.failures import fails_with


def test_classes_have_the_numbers_of_the_head() -> None:
    found = class_numbers(["b", ("a", "b"), "a"], ["b", "a"], "a.csv")
    assert [row.tolist() for row in found] == [[0], [1, 0], [1]]
    assert all(row.dtype == np.int64 for row in found)


def test_a_class_that_may_be_a_text_is_not_quoted() -> None:
    """As where the columns of texts and labels are taken for each other."""
    with fails_with("data.unknown_class") as raised:
        class_numbers(["a", "SECRET has had asthma since the age of nine, she says"], ["a", "b"], "a.csv")
    assert "SECRET" not in str(raised.value)
    with fails_with("data.unknown_class"):
        class_numbers(["a", "c"], ["a", "b"], "a.csv")
