"""The gradients of linear layers, row by row, as a step of automatic differentiation instead of a pair of hooks.

Hooks keep the input of a layer in the forward pass and find its gradients in the backward pass. With gradient checkpointing the
forward pass runs twice, and hooks lose count. A function of autograd is recomputed with the rest, and keeps its input where
autograd keeps it, in the dtype of the product. The gradient of row n of y = x·Wᵀ + b is Σ_t ∂y[n, t] ⊗ x[n, t] for W, and
Σ_t ∂y[n, t] for b (Goodfellow 2015, https://arxiv.org/abs/1510.01799, equations 3 and 4, before the norm is taken).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.models.architecture import fill_rows
from cotune.privacy.mechanisms.factored_gradients import (
    FactoredGradients,
    RowGradients,
    has_fewer_factors,
    multiply,
    whole_of,
)


@dataclass(frozen=True)
class OuterProducts:
    """The gradients of b rows for a linear layer that reads one vector a row: above[i] ⊗ inputs[i] for W, above[i] for b.

    Attributes:
        above: (b, outputs) the gradients of the losses for the layer's outputs.
        inputs: (b, inputs) what the layer has read.
    """

    above: Tensor
    inputs: Tensor

    def first(self, rows: int) -> OuterProducts:
        """Those of the first rows alone."""
        return OuterProducts(self.above[:rows], self.inputs[:rows])


Keep = Callable[[nn.Linear, Tensor, Tensor], None]  # (layer, x, ∂loss/∂y), called once for each use of a layer


class _RecordingLinear(torch.autograd.Function):
    """x·Wᵀ + b, which hands x and ∂y to `keep`, and gives W and b no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear, keep: Keep) -> Tensor:
        dtype = _product_dtype(x)
        taken = x.to(dtype)
        kernel = weight.to(dtype)
        ctx.save_for_backward(taken, kernel)
        ctx.layer = layer
        ctx.keep = keep
        ctx.given_dtype = x.dtype
        return functional.linear(taken, kernel, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        [above] = gradients
        x, weight = ctx.saved_tensors
        above = above.to(x.dtype)
        ctx.keep(ctx.layer, x, above)
        below = _input_gradient(above, weight).to(ctx.given_dtype) if ctx.needs_input_grad[0] else None
        return below, None, None, None, None


def _input_gradient(above: Tensor, weight: Tensor) -> Tensor:
    """above·W, (n, …, inputs), of filled-up rows: in rows of odd widths a kernel may add in an order that goes by the place."""
    outputs, inputs = weight.shape
    above = fill_rows(above)
    weight = functional.pad(fill_rows(weight), (0, 0, 0, above.shape[-1] - outputs))
    return (above @ weight)[..., :inputs]


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a plain linear layer would multiply."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def add_grad_sample(layer: nn.Linear, x: Tensor, above: Tensor) -> None:
    """Add each row's gradients to `grad_sample` of the trained parameters; a layer that is used twice has the sum.

    Those of the weight stay factors where these are fewer numbers.

    Args:
        layer: Whose parameters they are.
        x: (n, …, inputs).
        above: (n, …, outputs).
    """
    rows = above.reshape(len(above), -1, above.shape[-1])
    if layer.weight.requires_grad:
        taken = x.reshape(len(x), -1, x.shape[-1])
        if has_fewer_factors(taken, rows):
            _add(layer.weight, FactoredGradients(len(rows), layer.weight.dtype, [(taken.detach(), rows.detach())]))
        else:
            _add(layer.weight, multiply(taken, rows))
    if layer.bias is not None and layer.bias.requires_grad:
        _add(layer.bias, rows.sum(dim=1))


def _add(parameter: Tensor, gradients: RowGradients) -> None:
    before = getattr(parameter, "grad_sample", None)
    if before is None:
        total = gradients
    elif isinstance(before, FactoredGradients) and isinstance(gradients, FactoredGradients):
        total = FactoredGradients(before.rows, before.dtype, [*before.factors, *gradients.factors])
    else:
        total = whole_of(before) + whole_of(gradients)
    parameter.grad_sample = total  # type: ignore[attr-defined]


def _forward(layer: nn.Linear, keep: Keep, x: Tensor) -> Tensor:
    found: Tensor = _RecordingLinear.apply(x, layer.weight, layer.bias, layer, keep)  # type: ignore[no-untyped-call]
    return found


@contextmanager
def recording(layers: Sequence[nn.Linear], keep: Keep = add_grad_sample) -> Iterator[None]:
    """For the time of the block, let layers record the gradients of each row, in `grad_sample` of their trained parameters.

    A parameter gets no `grad` from such a layer. One that has a `grad` all the same was used past its layer, so that its
    `grad_sample` is not all of its gradient.

    Args:
        layers: Plain `nn.Linear` layers, whose inputs have the rows in their first dimension.
        keep: Is given what a gradient is made of, and need not make it.
    """
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer, keep)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
