from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cotune.strategies import Update, apply_delta, difference
from cotune.strategies.registry import get_builtin_components

floats = st.floats(-1e3, 1e3, width=32)


def test_difference_is_new_minus_old_for_what_is_new() -> None:
    delta = difference({"a": torch.tensor([3.0, 1.0])}, {"a": torch.tensor([1.0, 1.5]), "b": torch.zeros(2)})
    assert {name: d.tolist() for name, d in delta.items()} == {"a": [2.0, -0.5]}
    with pytest.raises(KeyError):
        difference({"c": torch.zeros(1)}, {"a": torch.zeros(1)})


def test_apply_moves_what_has_a_delta_and_keeps_the_rest() -> None:
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}
    moved = apply_delta(state, {"a": torch.tensor([0.5, -3.0])})
    assert {name: t.tolist() for name, t in moved.items()} == {"a": [1.5, -1.0], "b": [5.0]}
    assert state["a"].tolist() == [1.0, 2.0]  # the old state is not touched
    with pytest.raises(KeyError):
        apply_delta(state, {"c": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.float64])
def test_apply_keeps_the_parameters_dtype(dtype: torch.dtype, delta_dtype: torch.dtype) -> None:
    moved = apply_delta({"a": torch.ones(3, dtype=dtype)}, {"a": torch.full((3,), 0.25, dtype=delta_dtype)})
    assert moved["a"].dtype == dtype
    assert moved["a"].tolist() == [1.25] * 3


def test_apply_adds_in_float64() -> None:
    """1 + 2⁻²⁴ + 2⁻⁵⁰ is just above the middle between two float32 numbers; the delta rounded to float32 is not."""
    moved = apply_delta({"a": torch.ones(1)}, {"a": torch.tensor([2.0**-24 + 2.0**-50], dtype=torch.float64)})
    assert moved["a"].tolist() == [1 + 2.0**-23]


@given(st.lists(st.tuples(floats, floats), min_size=1))
def test_applying_a_difference_leads_to_the_new_state(pairs: list[tuple[float, float]]) -> None:
    """Up to the rounding of Δθ to float32, a relative 2⁻²⁴ of Δθ; without any where the two are within a factor of two."""
    old, new = (torch.tensor(values) for values in zip(*pairs, strict=True))
    reached = apply_delta({"a": old}, difference({"a": new}, {"a": old}))["a"]
    assert reached.dtype == torch.float32
    close = (old * new >= 0) & (2 * old.abs() >= new.abs()) & (2 * new.abs() >= old.abs())
    assert torch.equal(reached[close], new[close])  # Sterbenz: the subtraction is exact
    bound = 2.0**-23 * torch.maximum((new - old).abs(), new.abs()).double() + 1e-44
    assert bool(((reached.double() - new.double()).abs() <= bound).all())


def test_weights() -> None:
    delta: dict[str, Tensor] = {}
    update = Update("a", 1, delta, examples=250, steps=10)
    assert get_builtin_components("weighting")["examples"].build(update) == 250.0
    assert get_builtin_components("weighting")["uniform"].build(update) == 1.0
