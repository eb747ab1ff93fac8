"""What a unit contributes: at most C, whatever its gradient is, and exactly the same no matter who else is there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotune.privacy.mechanisms.exact_sum import ClippingMode, ExactSum, clip_factors
from cotune.privacy.mechanisms.grid_noise import choose_grid

SHAPES = ((7, 5), (5,), (1, 3), ())
ENTRIES = 44
both = pytest.mark.parametrize("clipping", ["flat", "per_layer"])


def gradients(count: int, seed: int, exponent: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape, generator=generator) * 10**exponent for shape in SHAPES]


def summed(found: list[Tensor], clip: float, sigma: float, clipping: ClippingMode) -> list[Tensor]:
    total = ExactSum([torch.zeros(shape) for shape in SHAPES], choose_grid(clip, sigma, ENTRIES), clipping)
    total.add([g.clone() for g in found])
    return total.totals()


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


@both
@settings(max_examples=100, deadline=None)
@given(
    exponent=st.floats(-30, 38),
    clip=st.sampled_from([1e-6, 1e-3, 1.0, 50.0, 1e3]),
    sigma=st.floats(0.3, 1000.0),
    seed=st.integers(0, 99),
)
def test_a_contribution_is_at_most_the_clip_norm(
    clipping: ClippingMode, exponent: float, clip: float, sigma: float, seed: int
) -> None:
    found = [g.nan_to_num(posinf=3e38, neginf=-3e38) for g in gradients(1, seed, exponent)]
    assert norm(summed(found, clip, sigma, clipping)) <= clip


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_are_clipped_in_float32(clipping: ClippingMode, dtype: torch.dtype) -> None:
    """In bfloat16 alone a contribution reached 1.0038 of the clip norm."""
    for seed in range(50):
        found = [g.to(dtype) for g in gradients(1, seed, 1.0)]
        assert norm(summed(found, 1.0, 1.0, clipping)) <= 1.0


@both
@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.floats(-6, 6), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_added_unit_changes_sum_by_exactly_its_contribution(clipping: ClippingMode, sizes: list[float], seed: int) -> None:
    """To the bit, in any order, in one block or in several."""
    units = [gradients(1, seed + i, size) for i, size in enumerate(sizes)]
    together = summed([torch.cat(parts) for parts in zip(*units, strict=True)], 1.0, 2.0, clipping)
    reversed_ = summed([torch.cat(parts) for parts in zip(*reversed(units), strict=True)], 1.0, 2.0, clipping)
    others = summed([torch.cat(parts) for parts in zip(*units[1:], strict=True)], 1.0, 2.0, clipping)
    alone = summed(units[0], 1.0, 2.0, clipping)
    for whole, same, rest, own in zip(together, reversed_, others, alone, strict=True):
        assert torch.equal(whole, same)
        assert torch.equal(whole - rest, own)


@both
def test_the_clipped_sum_by_hand(clipping: ClippingMode) -> None:
    found = gradients(3, 0, 0.5)
    expected: list[Any] = []
    for i, g in enumerate(found):
        total = torch.zeros(g.shape[1:], dtype=torch.float64)
        for unit in range(3):
            size = norm([h[unit] for h in found]) if clipping == "flat" else norm([found[i][unit]])
            bound = 2.0 if clipping == "flat" else 2.0 / math.sqrt(len(SHAPES))
            total += g[unit].double() * min(1.0, bound / size)
        expected.append(total)
    actual = summed(found, 2.0, 1.0, clipping)
    assert norm([a - e for a, e in zip(actual, expected, strict=True)]) < 1e-5 * norm(expected)


def test_a_gradient_of_zero_contributes_nothing() -> None:
    zero = [torch.zeros(1, *shape) for shape in SHAPES]
    assert norm(summed(zero, 1.0, 1.0, "flat")) == 0.0
    assert [float(f) for f in clip_factors(zero, 1.0, "flat")] == [1.0] * len(SHAPES)
