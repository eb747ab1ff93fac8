"""Fusions that need only sums: written as generators, they never see a single update.

Such a rule yields a *contribution*, a function that each organization could apply to its own update, and receives the sum over
all of them. A rule of several passes yields again; what it knows so far is in the closure of the next contribution, as if it had
been broadcast:

>>> def mean():
...     sums = yield lambda update: {"w": torch.tensor(update.scalar), "d": update.scalar * update.delta["x"]}
...     return {"x": sums["d"] / sums["w"]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cotune.strategies.tensor_blocks import add_exactly, empty, flatten, measure, read_blocks, shape_of, sum_squares
from cotune.strategies.types import Aggregate, Delta, WeightedUpdate

Contribution = Callable[[WeightedUpdate], Mapping[str, Tensor]]  # of one update, in float64
Sums = Generator[Contribution, Mapping[str, Tensor], Delta | Aggregate]

_WEIGHT = "weight of "


def weighted(update: WeightedUpdate, delta: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return w_k Δ_k and w_k of every parameter, whose sums give the weighted mean over those that sent it.

    Args:
        update: For its weight.
        delta: A transformed delta; None: the update's own.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in (update.delta if delta is None else delta).items():
        weight = update.weight_of(name)
        found[name] = tensor * weight
        found[_WEIGHT + name] = torch.as_tensor(weight, dtype=torch.float64)
    return found


def weighted_mean(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Σ w_k Δ_k / Σ w_k of every parameter, from sums of `weighted`; 0 for entries whose weights are all 0."""
    names = [name for name in sums if _WEIGHT + name in sums]
    return {name: torch.where(sums[_WEIGHT + name] > 0, sums[name] / sums[_WEIGHT + name], 0.0) for name in names}


def average(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return Σ w_i y_i / Σ w_i, with the same sums as for parameters; 0 for entries whose weights are all 0.

    Args:
        values: y_i, of one shape.
        weights: w_i, 0 or more, each a number or of a shape that broadcasts to that of the values.
    """
    sums: dict[str, Tensor] = {}
    for value, weight in zip(values, weights, strict=True):
        total(sums, {"y": value * weight, f"{_WEIGHT}y": weight})
    return weighted_mean(sums)["y"]


def divide(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute `weighted_mean` in place; the sums are consumed."""
    found: dict[str, Tensor] = {}
    for name in [name for name in sums if _WEIGHT + name in sums]:
        weight = sums.pop(_WEIGHT + name)
        if weight.dim():
            found[name] = torch.where(weight > 0, sums.pop(name) / weight, 0.0)
        else:
            found[name] = sums.pop(name).div_(weight) if float(weight) > 0 else sums.pop(name).zero_()
    return found


def norm(delta: Delta) -> float:
    """Return ‖Δ‖₂ over all parameters in float64, independent of their order, which a file or a sender may change."""
    return math.sqrt(measure(delta))


def total(sums: dict[str, Tensor], contribution: Mapping[str, Tensor]) -> None:
    """Add a contribution to the running sums in place; shapes may broadcast, as one weight stands for all entries."""
    for name, tensor in contribution.items():
        if name in sums and sums[name].shape == tensor.shape:
            sums[name] += tensor
        elif name in sums:  # one weight for the whole tensor, and weights by entry, of an update that has only a part of it
            sums[name] = sums[name] + tensor
        else:
            sums[name] = tensor.to(torch.float64, copy=True)


def add_weighted(sums: dict[str, Tensor], update: WeightedUpdate) -> float:
    """Add `weighted(update)` to the running sums, bit for bit, in one pass and without creating it.

    Returns:
        ‖Δ_k‖². If an entry is not finite, neither is this nor the sums.
    """
    squares = []
    for name in update.update.delta:
        weight = update.weight_of(name)
        if isinstance(weight, Tensor) or not _fits(sums.get(name), shape_of(update.update.delta, name)):
            delta = update.padded(name)
            squares.append(measure({name: delta}))
            total(sums, {name: delta * weight})
        else:
            squares.append(_add_scaled(sums, name, update.update.delta, weight))
        total(sums, {_WEIGHT + name: torch.as_tensor(weight, dtype=torch.float64)})
    return add_exactly(squares)


def _fits(running: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Return whether entries of that shape can be added in place."""
    return running is None or (running.shape == shape and running.is_contiguous())


def _add_scaled(sums: dict[str, Tensor], name: str, delta: Delta, weight: float) -> float:
    """Add w_k Δ_k to the sum of a parameter, and return Σ of the squares of Δ_k."""
    is_first = name not in sums
    if is_first:
        sums[name] = empty(shape_of(delta, name))
    running = flatten(sums[name])
    squares = []
    with np.errstate(all="ignore"):  # the result shows whether all entries are finite
        for where, block in read_blocks(delta, name):
            squares.append(sum_squares(block))
            np.multiply(block, weight, out=running[where] if is_first else block)
            if not is_first:
                running[where] += block
    return add_exactly(squares)
