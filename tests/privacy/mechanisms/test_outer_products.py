"""Outer products add up as the gradients that they stand for, and bound what a row may contribute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cotune.privacy.mechanisms.clipped_sum import ClippedSum
from cotune.privacy.mechanisms.dp_sgd import check_clipping
from cotune.privacy.mechanisms.exact_sum import ClippingMode
from cotune.privacy.mechanisms.grid_noise import grid_step
from cotune.privacy.mechanisms.linear_gradients import OuterProducts
from cotune.privacy.mechanisms.outer_products import OuterProductSum
from cotune.privacy.mechanisms.per_example import Batch, PerExample, per_example, unit_gradients
from tests.support.batches import in_batches

OUTPUTS, INPUTS = 3, 5
FINE = 2.0**-60  # finer than any sum: what is added is seen as it is
both = pytest.mark.parametrize("clipping", ["flat", "per_layer"])
biases = pytest.mark.parametrize("bias", [True, False])


def rows(count: int, seed: int, above: float = 0.0, inputs: float = 0.0) -> OuterProducts:
    """Random ones, scaled by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, OUTPUTS, generator=generator), torch.randn(count, INPUTS, generator=generator)
    return OuterProducts(above=drawn[0] * 10**above, inputs=drawn[1] * 10**inputs)


def like(bias: bool) -> list[Tensor]:
    return [torch.zeros(OUTPUTS, INPUTS), *([torch.zeros(OUTPUTS)] if bias else [])]


def summed(
    found: Sequence[OuterProducts], clip: float, clipping: ClippingMode, *, bias: bool, grid_step: float | None = FINE
) -> list[Tensor]:
    total = OuterProductSum(like(bias), clip, grid_step=grid_step, clipping_mode=clipping)
    for some in found:
        total.add(some)
    return total.totals()


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


@both
@biases
@settings(max_examples=100, deadline=None)
@given(
    above=st.floats(-30, 38),
    inputs=st.floats(-42, 38),
    clip=st.sampled_from([1e-6, 1e-3, 1.0, 50.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_a_row_contributes_at_most_the_clip_norm(
    clipping: ClippingMode, bias: bool, above: float, inputs: float, clip: float, seed: int
) -> None:
    found = rows(1, seed, above, inputs)
    assert norm(summed([found], clip, clipping, bias=bias)) <= clip


@both
@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.floats(-6, 6), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_added_row_changes_sum_by_exactly_its_contribution(clipping: ClippingMode, sizes: list[float], seed: int) -> None:
    """To the bit, in any order, in one block or in several."""
    found = [rows(1, seed + i, size, -size / 2) for i, size in enumerate(sizes)]
    joined = OuterProducts(torch.cat([r.above for r in found]), torch.cat([r.inputs for r in found]))
    together = summed([joined], 1.0, clipping, bias=True)
    reverse = summed(found[::-1], 1.0, clipping, bias=True)
    others = summed(found[1:], 1.0, clipping, bias=True)
    alone = summed(found[:1], 1.0, clipping, bias=True)
    for whole, same, rest, own in zip(together, reverse, others, alone, strict=True):
        assert torch.equal(whole, same)
        assert torch.equal(whole - rest, own)


@both
@biases
@pytest.mark.parametrize(("step", "tolerance"), [(FINE, 1e-4), (None, 1e-6)])
def test_outer_products_sum_to_what_their_gradients_do(
    clipping: ClippingMode, bias: bool, step: float | None, tolerance: float
) -> None:
    found = rows(40, 0)
    clip = 2.0  # of some it is the bound, and of others not
    expected = ClippedSum(like(bias), clip, 0.0, clipping)
    gradients = [found.above[:, :, None] * found.inputs[:, None, :], found.above.clone()]
    expected.add(gradients[: len(like(bias))])
    actual = summed([found], clip, clipping, bias=bias, grid_step=step)
    assert norm([a - e for a, e in zip(actual, expected.totals(), strict=True)]) <= tolerance * 40 * clip


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["above", "inputs"])
def test_a_row_without_a_finite_gradient_contributes_nothing(value: float, where: str) -> None:
    found = rows(3, 0)
    getattr(found, where)[1, 2] = value
    kept = OuterProducts(found.above[[0, 2]], found.inputs[[0, 2]])
    pairs = zip(summed([found], 1.0, "flat", bias=True), summed([kept], 1.0, "flat", bias=True), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_zero_vector_moves_the_bias_alone() -> None:
    weight, bias = summed([OuterProducts(torch.ones(1, OUTPUTS), torch.zeros(1, INPUTS))], 10.0, "flat", bias=True)
    assert not bool(weight.any())
    torch.testing.assert_close(bias, torch.ones(OUTPUTS, dtype=torch.float64))


@both
@settings(max_examples=50, deadline=None)
@given(sigma=st.floats(0.05, 100.0), clip=st.sampled_from([1e-3, 1.0, 50.0]), seed=st.integers(0, 99))
def test_rounded_sums_of_neighbors_differ_by_the_clip_norm(clipping: ClippingMode, sigma: float, clip: float, seed: int) -> None:
    """As the noise sees them: on its grid, whose step is not that of the products."""
    step = grid_step(clip, sigma)
    seen = []
    for found in (rows(5, seed, 2.0), rows(5, seed, 2.0).first(4)):
        total = ClippedSum(like(bias=True), clip, sigma, clipping)
        total.add(found)
        seen.append([t.div(step).round().mul(step) for t in total.totals()])
    assert norm([one - other for one, other in zip(*seen, strict=True)]) <= clip


def test_a_sum_beyond_the_whole_numbers_of_float64_stays_exact() -> None:
    """2²¹ rows along one axis sum up to more than 2⁵³ fine steps, where float64 leaves out odd numbers."""
    many = OuterProducts(torch.ones(2**18, 1), torch.ones(2**18, 1))
    against = OuterProducts(-many.above, many.inputs)
    single = OuterProducts(torch.full((1, 1), 0.3), torch.full((1, 1), 0.7))
    found = []
    for blocks in ([*[many] * 9, single, *[against] * 9], [single]):
        total = OuterProductSum([torch.zeros(1, 1)], 1.0, grid_step=FINE, clipping_mode="flat")
        for block in blocks:
            total.add(block)
        found += total.totals()
    assert torch.equal(*found)


class Head(nn.Module):
    """One linear layer, as a head on features is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(INPUTS, OUTPUTS)

    def loss(self, batch: Batch) -> Tensor:
        """Of classes that count differently; -100 marks a slot without a record."""
        weights = torch.tensor([1.0, 0.2, 3.0])
        return functional.cross_entropy(self.layer(batch["x"]), batch["y"], weight=weights, reduction="none", ignore_index=-100)


def records(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(INPUTS, generator=generator) * (i + 1), "y": torch.tensor(i % OUTPUTS)} for i in range(count)]


def materialized(of: PerExample) -> PerExample:
    """The same gradients, never as outer products."""
    return PerExample(of.parameters, of.gradients, cast(Any, of.gradients))


@both
@pytest.mark.parametrize("people", [False, True])
def test_units_add_up_alike_with_and_without_outer_products(clipping: ClippingMode, people: bool) -> None:
    """Class weights, blank slots, and units of one and of several records beside each other."""
    units = [[0, 3, 4], [1], [2], [5, 6]] if people else [[i] for i in range(7)]
    head = Head()
    found = []
    with per_example(head, head.loss) as of:
        for way in (of, materialized(of)):
            total = ClippedSum(of.parameters, 0.8, 0.0, clipping)
            forms = set()
            for gradients, _ in unit_gradients(way, units, in_batches(records(7), 4)):
                forms.add(type(gradients))
                total.add(gradients)
            found.append(total.totals())
            assert (OuterProducts in forms) == (way is of)
    assert norm([a - b for a, b in zip(*found, strict=True)]) <= 1e-6 * len(units)


class Outside(Head):
    """Uses its weight past the layer, which an outer product does not see."""

    def loss(self, batch: Batch) -> Tensor:
        """With a penalty for each row."""
        return super().loss(batch) + (batch["x"] @ self.layer.weight.T).square().sum(dim=1)


@both
def test_check_clipping_proves_outer_products(clipping: ClippingMode) -> None:
    head = Head()
    seen = records(3)
    alone = [{key: value[None] for key, value in record.items()} for record in seen]
    error = check_clipping(head, head.loss, batches=in_batches(seen, 4), alone=alone, clip_norm=0.5, clipping_mode=clipping)
    assert error < 1e-5
    wrong = Outside()
    with pytest.raises(RuntimeError):
        check_clipping(wrong, wrong.loss, batches=in_batches(seen, 4), alone=alone, clip_norm=0.5, clipping_mode=clipping)
