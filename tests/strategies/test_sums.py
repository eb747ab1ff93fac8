"""What norms of deltas do not depend on."""

from __future__ import annotations

import math

import torch

from cotune.strategies.sums import norm


def test_a_norm_by_hand() -> None:
    assert norm({"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor(4.0)}) == 5.0
    assert norm({}) == 0.0


def test_norm_is_bit_equal_for_any_parameter_order() -> None:
    """A file keeps another order than the sender. Added to 2⁵⁴ one by one, forty ones are lost."""
    delta = {"large": torch.tensor(2.0**27), **{str(i): torch.ones(()) for i in range(40)}}
    assert norm(delta) == norm(dict(reversed(delta.items()))) == math.sqrt(2**54 + 40)
