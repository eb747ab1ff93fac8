from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.privacy.accounting.display_rounding import round_up


@pytest.mark.parametrize(
    ("epsilon", "printed"),
    [(0.0, "0.00"), (8.0, "8.00"), (7.991, "8.00"), (2.994, "3.00"), (0.29, "0.29"), (1.1, "1.10"), (0.001, "0.01")],
)
def test_epsilon_is_rounded_up(epsilon: float, printed: str) -> None:
    assert round_up(epsilon) == printed


@given(st.floats(0.0, 1e4))
def test_a_printed_epsilon_is_never_smaller_than_the_true_one(epsilon: float) -> None:
    assert epsilon - 1e-9 <= float(round_up(epsilon)) < epsilon + 0.0101
