"""What sums and norms of deltas do not depend on."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.strategies.sums import norm

VALUES = st.lists(st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=False), min_size=1, max_size=6)


def test_a_norm_by_hand() -> None:
    assert norm({"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor(4.0)}) == 5.0
    assert norm({}) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=6).flatmap(lambda found: st.tuples(st.just(found), st.permutations(found))))
def test_a_norm_is_the_same_to_the_bit_whatever_the_order_of_the_parameters(
    orders: tuple[list[list[float]], list[list[float]]],
) -> None:
    """A file keeps another order than the sender."""
    one, other = (norm({str(i): torch.tensor(each) for i, each in enumerate(order)}) for order in orders)
    assert one == other
    assert math.isclose(one, math.sqrt(sum(x * x for each in orders[0] for x in each)), rel_tol=1e-9)
