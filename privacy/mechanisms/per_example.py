"""The gradient of each row of a batch by itself, of linear layers and by Opacus' hooks, and the sum for each unit.

Nothing here decides what a row contributes: see `clipping`.

What one unit contributes to a sum: its gradient, clipped to the norm C and rounded to a grid.

Contract: whatever finite gradient a unit has, its contribution is a vector of whole grid steps with an L2 norm of at most C over
all trained parameters, and a function of that gradient alone; the sum of contributions is exact. A unit more or less therefore
changes the sum by exactly its contribution. Flat clipping: Abadi et al., CCS 2016, algorithm 1. Per layer: each parameter tensor
by itself to C/√L, so that all L together stay within C (McMahan et al., ICLR 2018, section 3.2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleModule, register_grad_sampler
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from torch import Tensor, nn
from torch.nn import functional

from cotune.privacy.mechanisms.linear_gradients import recording
from cotune.privacy.mechanisms.noise import Grid

Batch = dict[str, Tensor]
LossPerExample = Callable[[Batch], Tensor]  # (a batch of b slots) -> (b,) losses, each of one row alone
Unit = Sequence[int]  # the numbers of its rows
Batches = Callable[[Sequence[int]], Iterator[tuple[Sequence[int], Batch]]]
"""Row numbers -> batches of a fixed shape, each with the positions, in the list of row numbers, of the rows in its first slots.

Slots after those are blank. Rows of one unit keep their order.
"""

_MOST_ENTRIES = 2**26  # of the sums of units that are held at a time: 256 MiB in float32


@dataclass(frozen=True)
class PerExample:
    """Gradients of a module's trained parameters.

    Attributes:
        parameters: The trained ones, in the module's order.
        gradients: A batch of b slots -> (losses (b,), a gradient (b, *shape) for each parameter, in the parameter's dtype).
    """

    parameters: tuple[nn.Parameter, ...]
    gradients: Callable[[Batch], tuple[Tensor, list[Tensor]]]


@contextmanager
def per_example(module: nn.Module, loss: LossPerExample) -> Iterator[PerExample]:
    """Give gradients of single rows inside the block, and leave nothing on the module after it.

    The losses of a batch are summed for the backward pass, so that nothing is scaled by the number of slots.

    Raises:
        NotImplementedError: For a module that cannot have gradients of single rows, such as batch normalization.
        RuntimeError, AttributeError: From `gradients`, for a trained parameter that takes no part in the forward pass.
    """
    parameters = tuple(p for p in module.parameters() if p.requires_grad)
    hooks = _HooksBesideLinear(module)

    def gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        _forget(parameters)
        with warnings.catch_warnings():  # no input of the first hooked layer needs a gradient; the hooks do not mind
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses = loss(batch)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        _check_recorded(hooks.linear)
        found = [_of(p).to(p.dtype) for p in parameters]  # under autocast they are bfloat16, too coarse to find a norm from
        _forget(parameters)
        return losses.detach(), found

    try:
        with recording(hooks.linear):
            yield PerExample(parameters, gradients)
    finally:
        hooks.cleanup()
        for p in module.parameters():
            p.grad = None


class _HooksBesideLinear(GradSampleHooks):  # type: ignore[misc]
    """Opacus' hooks on all layers with trained parameters but plain linear ones, which record by themselves.

    Attributes:
        linear: Those layers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.linear: list[nn.Linear] = []
        super().__init__(module, loss_reduction="sum", strict=True)

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        """Called by Opacus for the module, and by itself for each of its parts."""
        for layer in super().iterate_submodules(module):
            if type(layer) is nn.Linear:
                self.linear.append(layer)
            else:
                yield layer


def _check_recorded(layers: Sequence[nn.Linear]) -> None:
    """A layer that records gives its parameters no other gradient: one that is there came past the layer."""
    if any(p.grad is not None for layer in layers for p in layer.parameters(recurse=False)):
        raise RuntimeError("a trained parameter takes part in the forward pass past its own layer, as a tied one does")


@register_grad_sampler(nn.LayerNorm)  # type: ignore[untyped-decorator]
def _layer_norm(layer: nn.LayerNorm, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Opacus' rule, and the same for a layer without a bias (as in ModernBERT), for which it has none."""
    if layer.bias is not None:
        return dict(compute_layer_norm_grad_sample(layer, activations, backprops))
    if not layer.weight.requires_grad:
        return {}
    gradients = functional.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps) * backprops
    between = list(range(1, gradients.dim() - layer.weight.dim()))
    return {layer.weight: gradients.sum(dim=between) if between else gradients}


def kinds_without_rule(module: nn.Module) -> list[str]:
    """Return the kinds of layers with trained parameters of their own that Opacus has no rule for, and can only try."""
    known = GradSampleModule.GRAD_SAMPLERS
    layers = (m for m in module.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in known})


def _of(parameter: nn.Parameter) -> Tensor:
    found = parameter.grad_sample  # type: ignore[attr-defined]
    if not isinstance(found, Tensor):
        raise RuntimeError("a trained parameter takes no part in the forward pass, or a part in two")
    return found


def _forget(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
        p.grad_sample = None  # type: ignore[attr-defined]


def unit_gradients(
    of: PerExample, units: Sequence[Unit], batches: Batches
) -> Iterator[tuple[list[Tensor], list[tuple[int, float]]]]:
    """Yield blocks of gradients of whole units: (k, *shape) for each parameter, k units at a time, every unit in one block.

    A unit's gradient is the sum of its rows' gradients in float32, in the order of its rows within each batch and of the batches:
    a function of the unit alone, as each row's gradient is. A row without a finite gradient contributes nothing, and neither
    does a unit whose sum is not finite.

    Args:
        units: Those of one step, as lists of row numbers.

    Yields:
        The block, and (rows, sum of their losses) of the batches that it was made from.
    """
    if all(len(unit) == 1 for unit in units):
        yield from _single(of, [unit[0] for unit in units], batches)
        return
    size = max(1, _MOST_ENTRIES // sum(p.numel() for p in of.parameters))
    for start in range(0, len(units), size):
        yield _summed(of, units[start : start + size], batches)


def _single(of: PerExample, rows: Sequence[int], batches: Batches) -> Iterator[tuple[list[Tensor], list[tuple[int, float]]]]:
    for positions, batch in batches(rows):
        gradients, loss = _finite_rows(of, len(positions), batch)
        yield gradients, [(len(positions), loss)]


def _summed(of: PerExample, units: Sequence[Unit], batches: Batches) -> tuple[list[Tensor], list[tuple[int, float]]]:
    owners = torch.tensor([number for number, unit in enumerate(units) for _ in unit])
    rows = [row for unit in units for row in unit]
    sums = [torch.zeros(len(units), *p.shape, dtype=p.dtype, device=p.device) for p in of.parameters]
    losses = []
    for positions, batch in batches(rows):
        gradients, loss = _finite_rows(of, len(positions), batch)
        losses.append((len(positions), loss))
        for slots, number in _in_turn(owners[torch.as_tensor(positions)]):
            for total, gradient in zip(sums, gradients, strict=True):
                total[number.to(total.device)] += gradient[slots.to(total.device)]
    _zero_unless_finite(sums)  # finite rows may add up to more than float32 holds
    return sums, losses


def _in_turn(owners: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The slots of a batch and their units: first the first row of each unit, then the second, …, no unit twice at a time."""
    seen: dict[int, int] = {}
    turn = []
    for owner in owners.tolist():
        turn.append(seen.get(owner, 0))
        seen[owner] = turn[-1] + 1
    turns = torch.tensor(turn)
    for number in range(max(turn) + 1):
        slots = (turns == number).nonzero()[:, 0]
        yield slots, owners[slots]


def _finite_rows(of: PerExample, rows: int, batch: Batch) -> tuple[list[Tensor], float]:
    """The gradients of the filled slots, zero for a row that has no finite one, and the sum of the rows' losses."""
    losses, whole = of.gradients(batch)
    gradients = [g[:rows] for g in whole]
    _zero_unless_finite(gradients)
    return gradients, float(losses[:rows].double().sum())


def _zero_unless_finite(gradients: Sequence[Tensor]) -> None:
    """Sets those of k gradients, (k, *shape) for each parameter, to zero that are not finite in every entry."""
    if all(bool(g.sum().isfinite()) for g in gradients):  # one pass; a sum that overflows only costs a second look
        return
    finite = torch.stack([g.reshape(len(g), -1).isfinite().all(dim=1) for g in gradients]).all(dim=0)
    for g in gradients:
        g[~finite] = 0.0


Clipping = Literal["flat", "per_layer"]  # one norm for the whole gradient | C/√L for each of the L parameter tensors


def clip_factors(gradients: Sequence[Tensor], clip_norm: float, clipping: Clipping) -> list[Tensor]:
    """Return min(1, C/‖g_i‖) for each unit i, as (k,) in float64, once for each parameter tensor.

    Args:
        gradients: (k, *shape) for each parameter; finite. Norms are taken in float64, where no float32 entry overflows.
        clip_norm: C > 0.
    """
    squares = [g.reshape(len(g), -1).to(torch.float64, copy=True).square_().sum(dim=1) for g in gradients]
    if clipping == "flat":
        whole = torch.stack(squares).sum(dim=0).sqrt_()
        return [_factor(whole, clip_norm)] * len(gradients)
    share = clip_norm / math.sqrt(len(gradients))
    return [_factor(square.sqrt_(), share) for square in squares]


def _factor(norms: Tensor, bound: float) -> Tensor:
    return (bound / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp_(max=1.0)


class ExactSum:
    """Σ_i round(c_i / step), where c_i is the clipped gradient of unit i: whole numbers, in float64.

    Args:
        like: The trained parameters: their shapes and device.
        grid: Of `noise.grid_of`, for as many entries as `like` has.
    """

    def __init__(self, like: Sequence[Tensor], grid: Grid, clipping: Clipping) -> None:
        self._grid = grid
        self._clipping: Clipping = clipping
        self._steps = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in like]

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add the contributions of k units, given (k, *shape) for each parameter; what is given may be overwritten."""
        factors = clip_factors(gradients, self._grid.clip_norm, self._clipping)
        for total, gradient, factor in zip(self._steps, gradients, factors, strict=True):
            scale = (factor / self._grid.step).to(gradient.dtype).reshape(-1, *[1] * (gradient.dim() - 1))
            total += gradient.mul_(scale).round_().sum(dim=0, dtype=torch.float64)

    def totals(self) -> list[Tensor]:
        """Return the sums in units of the gradient, float64: whole multiples of the grid's step."""
        return [steps * self._grid.step for steps in self._steps]
