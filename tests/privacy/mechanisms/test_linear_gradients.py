"""Gradients of linear layers, row by row, against autograd on one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cotune.privacy.mechanisms.linear_gradients import recording
from cotune.privacy.mechanisms.per_example import Batch, LossPerExample, per_example


def one_at_a_time(module: nn.Module, loss: LossPerExample, rows: Tensor) -> list[tuple[Tensor, ...]]:
    trained = tuple(p for p in module.parameters() if p.requires_grad)
    return [torch.autograd.grad(loss({"x": rows[n : n + 1]}).sum(), trained) for n in range(len(rows))]


def assert_same(found: Sequence[Tensor], expected: Sequence[tuple[Tensor, ...]], **tolerance: float) -> None:
    for number, alone in enumerate(expected):
        for gradients, gradient in zip(found, alone, strict=True):
            torch.testing.assert_close(gradients[number], gradient, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4), (1, 4)])
def test_gradients_are_those_of_single_rows(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 2, bias=bias))
    rows = torch.randn(shape)

    def loss(batch: Batch) -> Tensor:
        return module(batch["x"]).sin().flatten(1).sum(dim=1)

    with per_example(module, loss) as of:
        losses, found = of.gradients({"x": rows})
    assert torch.equal(losses, loss({"x": rows}).detach())
    assert_same(found, one_at_a_time(module, loss, rows))


def test_frozen_parameters_get_no_gradient() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    module[1].bias.requires_grad_(False)

    def loss(batch: Batch) -> Tensor:
        return module(batch["x"]).square().sum(dim=1)

    rows = torch.randn(5, 4)
    with per_example(module, loss) as of:
        _, found = of.gradients({"x": rows})
    assert [tuple(each.shape) for each in found] == [(5, 2, 3)]
    assert_same(found, one_at_a_time(module, loss, rows))


def test_a_layer_that_is_used_twice_has_the_sum() -> None:
    module = nn.Linear(4, 4)

    def loss(batch: Batch) -> Tensor:
        return module(module(batch["x"]).tanh()).sin().sum(dim=1)

    rows = torch.randn(5, 4)
    with per_example(module, loss) as of:
        _, found = of.gradients({"x": rows})
    assert_same(found, one_at_a_time(module, loss, rows))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    torch.manual_seed(0)
    first = nn.Linear(4, 6)
    second = nn.Linear(6, 2)
    module = nn.ModuleList([first, second])

    def loss(batch: Batch) -> Tensor:
        given = batch["x"].requires_grad_(reentrant)  # the reentrant form needs an input with a gradient
        return checkpoint(lambda x: second(first(x).tanh()), given, use_reentrant=reentrant).sin().sum(dim=(1, 2))

    def plain(batch: Batch) -> Tensor:
        return second(first(batch["x"]).tanh()).sin().sum(dim=(1, 2))

    rows = torch.randn(5, 3, 4)
    with per_example(module, loss) as of:
        _, found = of.gradients({"x": rows.clone()})
    assert_same(found, one_at_a_time(module, plain, rows))


def test_under_autocast_gradients_are_those_of_bfloat16() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))
    rows = torch.randn(5, 3, 16)

    def loss(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(batch["x"]).float().sin().sum(dim=(1, 2))

    with per_example(module, loss) as of:
        _, found = of.gradients({"x": rows})
    assert all(each.dtype == torch.float32 for each in found)
    assert_same(found, one_at_a_time(module, loss, rows), rtol=0.05, atol=0.02)


def test_layers_of_other_kinds_still_have_their_gradients() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    def loss(batch: Batch) -> Tensor:
        return module(batch["x"]).sin().sum(dim=1)

    rows = torch.randn(5, 4)
    with per_example(module, loss) as of:
        _, found = of.gradients({"x": rows})
    assert_same(found, one_at_a_time(module, loss, rows))


def test_a_weight_that_is_used_past_its_layer_is_refused() -> None:
    """As a tied output layer may do: what is recorded would not be all of the gradient, and could not be clipped."""
    module = nn.Linear(4, 4)

    def loss(batch: Batch) -> Tensor:
        return functional.linear(module(batch["x"]), module.weight).sum(dim=1)

    with per_example(module, loss) as of, pytest.raises(RuntimeError):
        of.gradients({"x": torch.randn(3, 4)})


def test_a_layer_that_takes_no_part_is_refused() -> None:
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def loss(batch: Batch) -> Tensor:
        return module[0](batch["x"]).sum(dim=1)

    with per_example(module, loss) as of, pytest.raises(RuntimeError):
        of.gradients({"x": torch.randn(3, 4)})


OTHER_ROWS = {
    "positions": lambda x: x.reshape(-1, 1, 8),
    "vectors": lambda x: x.reshape(-1, 8),
    "twice": lambda x: torch.cat([x, x.flip(0)]),
    "one for all": lambda x: torch.ones(1, 3, 8),
}


@pytest.mark.parametrize("also_plain", [False, True])
@pytest.mark.parametrize("kind", OTHER_ROWS)
def test_a_layer_that_reads_other_rows_is_refused(kind: str, also_plain: bool) -> None:
    """Be it the only use of the layer, or one of two, of which the other is right."""
    module = nn.Linear(8, 8)

    def loss(batch: Batch) -> Tensor:
        x = batch["x"]
        plain = module(x).flatten(1).sum(dim=1) if also_plain else torch.zeros(len(x))
        return plain + module(OTHER_ROWS[kind](x)).square().sum()

    with per_example(module, loss) as of, pytest.raises(RuntimeError):
        of.factors({"x": torch.randn(4, 3, 8)})


def test_layers_are_as_before_after_the_block() -> None:
    layer = nn.Linear(4, 2)
    with pytest.raises(KeyError), recording([layer]):
        raise KeyError
    assert "forward" not in vars(layer)
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert not hasattr(layer.weight, "grad_sample")
