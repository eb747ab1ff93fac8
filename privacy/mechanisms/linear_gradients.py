"""The gradients of linear layers, row by row, as a step of automatic differentiation instead of a pair of hooks.

Hooks keep the input of a layer in the forward pass and find its gradients in the backward pass. With gradient checkpointing the
forward pass runs twice, and hooks lose count. A function of autograd is recomputed with the rest, and keeps its input where
autograd keeps it, in the dtype of the product. The gradient of row n of y = x·Wᵀ + b is Σ_t ∂y[n, t] ⊗ x[n, t] for W, and
Σ_t ∂y[n, t] for b (Goodfellow 2015, https://arxiv.org/abs/1510.01799, equations 3 and 4, before the norm is taken).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.models.architecture import fill_rows


class _RecordingLinear(torch.autograd.Function):
    """x·Wᵀ + b, which adds each row's gradients to `grad_sample` of W and b, and gives them no other gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear) -> Tensor:
        dtype = _product_dtype(x)
        taken = x.to(dtype)
        kernel = weight.to(dtype)
        ctx.save_for_backward(taken, kernel)
        ctx.layer = layer
        ctx.given_dtype = x.dtype
        return functional.linear(taken, kernel, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        [above] = gradients
        x, weight = ctx.saved_tensors
        above = above.to(x.dtype)
        _record(ctx.layer, x, above)
        below = _input_gradient(above, weight).to(ctx.given_dtype) if ctx.needs_input_grad[0] else None
        return below, None, None, None


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


def _record(layer: nn.Linear, x: Tensor, above: Tensor) -> None:
    """x: (n, …, inputs); above: (n, …, outputs). A layer that is used twice has the sum."""
    rows = above.reshape(len(above), -1, above.shape[-1])
    if layer.weight.requires_grad:
        taken = x.reshape(len(x), -1, x.shape[-1])
        products = fill_rows(rows).transpose(1, 2) @ fill_rows(taken)
        _add(layer.weight, products[:, : rows.shape[-1], : taken.shape[-1]])
    if layer.bias is not None and layer.bias.requires_grad:
        _add(layer.bias, rows.sum(dim=1))


def _add(parameter: Tensor, gradient: Tensor) -> None:
    before = getattr(parameter, "grad_sample", None)
    parameter.grad_sample = gradient if before is None else before + gradient  # type: ignore[attr-defined]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = _RecordingLinear.apply(x, layer.weight, layer.bias, layer)  # type: ignore[no-untyped-call]
    return found


@contextmanager
def recording(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """For the time of the block, let layers record the gradients of each row in `grad_sample` of their trained parameters.

    A parameter gets no `grad` from such a layer. One that has a `grad` all the same was used past its layer, so that its
    `grad_sample` is not all of its gradient.

    Args:
        layers: Plain `nn.Linear` layers, whose inputs have the rows in their first dimension.
    """
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
