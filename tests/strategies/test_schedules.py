from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.strategies.server_optimizers.schedules import Schedule, compute_rate
from cotune.strategies.types import RoundContext


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 2, 2, 2, 2, 2]),
        ("linear", [1, 2, 2, 1.5, 1, 0.5]),
        ("cosine", [1, 2, 2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)]),
        ("inverse_sqrt", [1, 2, 2, 2 / math.sqrt(2), 2 / math.sqrt(3), 1]),
    ],
)
def test_by_hand(schedule: Schedule, rates: list[float]) -> None:
    """Two rounds of warmup and four after it, at lr 2."""
    found = [compute_rate(2.0, schedule, 2, RoundContext(round=round, rounds=6)) for round in range(1, 7)]
    assert found == pytest.approx(rates)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine", "inverse_sqrt"]),
    warmup=st.integers(0, 30),
    rounds=st.integers(1, 30),
    lr=st.floats(1e-3, 10),
)
def test_a_round_is_never_for_nothing(schedule: Schedule, warmup: int, rounds: int, lr: float) -> None:
    for round in range(1, rounds + 1):
        assert 0 < compute_rate(lr, schedule, warmup, RoundContext(round=round, rounds=rounds)) <= lr * (1 + 1e-12)
