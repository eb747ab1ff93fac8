"""Gradients of single rows, and of units, whose rows are added up.

Linear layers record the gradients of single rows themselves; Opacus' hooks do it for all other layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleModule, register_grad_sampler
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from torch import Tensor, nn
from torch.nn import functional

from cotune.privacy.mechanisms.factored_gradients import (
    FactoredGradients,
    RowGradients,
    first_of,
    whole_of,
)
from cotune.privacy.mechanisms.linear_gradients import OuterProducts, add_grad_sample, recording

Batch = dict[str, Tensor]
LossPerExample = Callable[[Batch], Tensor]  # (a batch of b slots) -> (b,) losses, each of one row alone
Unit = Sequence[int]  # the numbers of its rows
Batches = Callable[[Sequence[int]], Iterator[tuple[Sequence[int], Batch]]]
"""Row numbers -> batches of a fixed shape, each with the positions, in the list of row numbers, of the rows in its first slots.

Slots after those are blank. Rows of one unit keep their order.
"""

MAX_HELD_ENTRIES = 2**26  # entries of summed unit gradients that are held at a time by default: 256 MiB in float32
UnitGradients = tuple[list[RowGradients] | OuterProducts, list[tuple[int, float]]]
"""Gradients of k whole units, for each parameter or as outer products; (rows, sum of their losses) of the batches they were made
from."""


@dataclass(frozen=True)
class PerExample:
    """Gradients of a module's trained parameters.

    Attributes:
        parameters: The trained ones, in the module's order.
        gradients: A batch of b slots -> (losses (b,), a gradient (b, *shape) for each parameter, in the parameter's dtype).
        factors: The same as outer products, where the parameters are those of one linear layer, used once, that reads one vector
            a row; else for each parameter as a tensor or, where these are fewer numbers, as factors.
    """

    parameters: tuple[nn.Parameter, ...]
    gradients: Callable[[Batch], tuple[Tensor, list[Tensor]]]
    factors: Callable[[Batch], tuple[Tensor, list[RowGradients] | OuterProducts]]


@contextmanager
def per_example(module: nn.Module, loss: LossPerExample) -> Iterator[PerExample]:
    """Provide gradients of single rows inside the block, and remove everything from the module after it.

    The losses of a batch are summed for the backward pass, so that no gradient is scaled by the number of slots.

    Args:
        module: Its parameters with requires_grad are differentiated.
        loss: A batch of b slots -> (b,) losses, each of one row alone.

    Raises:
        NotImplementedError: For a module that cannot have gradients of single rows, such as batch normalization.
        RuntimeError, AttributeError: From `gradients`, for a trained parameter that takes no part in the forward pass.
    """
    parameters = tuple(p for p in module.parameters() if p.requires_grad)
    hooks = _linear_alone(module) or _HooksBesideLinear(module)
    uses: list[tuple[nn.Linear, Tensor, Tensor]] = []  # of the one linear layer, where there is nothing else to train
    alone = len(hooks.linear) == 1 and _are_all_of(parameters, hooks.linear[0])

    def gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        losses, found = factors(batch)
        return losses, _multiply(found, parameters) if isinstance(found, OuterProducts) else [whole_of(g) for g in found]

    def factors(batch: Batch) -> tuple[Tensor, list[RowGradients] | OuterProducts]:
        _clear_gradients(parameters)
        uses.clear()
        with warnings.catch_warnings():  # no input of the first hooked layer needs a gradient; the hooks do not mind
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses = loss(batch)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        _check_recorded(hooks.linear)
        if len(uses) == 1 and uses[0][1].dim() == 2:
            _check_rows([uses[0][2]], len(losses))
            return losses.detach(), OuterProducts(above=uses[0][2], inputs=uses[0][1])
        for use in uses:
            add_grad_sample(*use)
        found = [_get_grad_sample(p) for p in parameters]
        _check_rows(found, len(losses))
        _clear_gradients(parameters)
        return losses.detach(), found

    try:
        with recording(hooks.linear, (lambda *use: uses.append(use)) if alone else add_grad_sample):
            yield PerExample(parameters, gradients, factors)
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

    def cleanup(self) -> None:
        """Leave nothing of a pass that failed half-way either: a later one would read inputs and sizes of that one's batch."""
        super().cleanup()
        for layer in self._module.modules():
            for left in ("activations", "max_batch_len"):
                layer.__dict__.pop(left, None)

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        """Called by Opacus for the module, and by itself for each of its parts."""
        for layer in super().iterate_submodules(module):
            if type(layer) is nn.Linear:
                self.linear.append(layer)
            else:
                yield layer


class _NoHooks:
    """In place of Opacus' hooks, where all that is trained are plain linear layers without buffers: they record by themselves.

    Attributes:
        linear: Those layers.
    """

    def __init__(self, linear: list[nn.Linear]) -> None:
        self.linear = linear

    def cleanup(self) -> None:
        """Leave nothing on the parameters."""
        for layer in self.linear:
            for parameter in layer.parameters(recurse=False):
                parameter.__dict__.pop("grad_sample", None)


def _linear_alone(module: nn.Module) -> _NoHooks | None:
    """What stands for hooks, where nothing but plain linear layers is trained; else None."""
    trained = [layer for layer in module.modules() if any(p.requires_grad for p in layer.parameters(recurse=False))]
    linear = [layer for layer in trained if type(layer) is nn.Linear and not layer._buffers]
    return _NoHooks(linear) if trained and len(linear) == len(trained) else None


def _are_all_of(parameters: Sequence[nn.Parameter], layer: nn.Linear) -> bool:
    """Whether the trained parameters are those of the layer and no others, its weight among them."""
    own = {id(p) for p in layer.parameters(recurse=False) if p.requires_grad}
    return own == {id(p) for p in parameters} and layer.weight.requires_grad


def _multiply(factors: OuterProducts, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients that outer products stand for: (b, *shape) for each parameter."""
    above = factors.above
    weight = above[:, :, None] * factors.inputs[:, None, :]
    return [part.to(p.dtype) for part, p in zip((weight, above), parameters, strict=False)]


def _check_recorded(layers: Sequence[nn.Linear]) -> None:
    """A layer that records gives its parameters no other gradient: one that is there came past the layer."""
    if any(p.grad is not None for layer in layers for p in layer.parameters(recurse=False)):
        raise RuntimeError("a trained parameter takes part in the forward pass past its own layer, as a tied one does")


@register_grad_sampler(nn.LayerNorm)  # type: ignore[untyped-decorator]
def _layer_norm(layer: nn.LayerNorm, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Apply Opacus' rule; the same rule for a layer without a bias (as in ModernBERT), which Opacus lacks."""
    if layer.bias is not None:
        return dict(compute_layer_norm_grad_sample(layer, activations, backprops))
    if not layer.weight.requires_grad:
        return {}
    gradients = functional.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps) * backprops
    between = list(range(1, gradients.dim() - layer.weight.dim()))
    return {layer.weight: gradients.sum(dim=between) if between else gradients}


def kinds_without_rule(module: nn.Module) -> list[str]:
    """Return the class names of layers with trained parameters of their own for which Opacus has no rule."""
    known = GradSampleModule.GRAD_SAMPLERS
    layers = (m for m in module.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in known})


def _get_grad_sample(parameter: nn.Parameter) -> RowGradients:
    """In the parameter's dtype: under autocast products are bfloat16, too coarse for a norm."""
    found = parameter.grad_sample  # type: ignore[attr-defined]
    if isinstance(found, FactoredGradients):
        return found
    if not isinstance(found, Tensor):
        raise RuntimeError("a trained parameter takes no part in the forward pass, or a part in two")
    return found.to(parameter.dtype)


def _check_rows(found: Sequence[RowGradients], rows: int) -> None:
    """A layer that is used on other rows than those of the batch, be it once of several times, has no gradient for each row."""
    for gradients in found:
        parts = [part for use in gradients.factors for part in use] if isinstance(gradients, FactoredGradients) else [gradients]
        counts = {len(part) for part in parts}
        if counts != {rows}:
            raise RuntimeError(f"a layer reads {sorted(counts)} rows where the batch has {rows}")


def _clear_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
        p.grad_sample = None  # type: ignore[attr-defined]


def unit_gradients(
    of: PerExample, units: Sequence[Unit], batches: Batches, max_held_entries: int = MAX_HELD_ENTRIES
) -> Iterator[UnitGradients]:
    """Yield the gradients of whole units in blocks of k units, every unit in one block.

    A unit of one row is an outer product where `of` has one for it, whatever the other units are. A larger unit's gradient is the
    sum of its rows' gradients in float32, in the order of its rows within each batch and of the batches: a function of the unit
    alone, as each row's gradient is. A row without a finite gradient contributes nothing, and neither does a unit whose sum is
    not finite.

    Args:
        of: The gradients of single rows.
        units: Those of one step, as lists of row numbers.
        batches: Row numbers -> batches.
        max_held_entries: Decides k where units have several rows.
    """
    sizes = list(map(len, units))
    larger = [] if sizes.count(1) == len(sizes) else [unit for unit, size in zip(units, sizes, strict=True) if size != 1]
    single = units if not larger else [unit for unit, size in zip(units, sizes, strict=True) if size == 1]
    yield from _single(of, list(chain.from_iterable(single)), batches)
    size = max(1, max_held_entries // sum(p.numel() for p in of.parameters))
    for start in range(0, len(larger), size):
        yield _summed(of, larger[start : start + size], batches)


def _single(of: PerExample, rows: Sequence[int], batches: Batches) -> Iterator[UnitGradients]:
    for positions, batch in batches(rows):
        count = len(positions)
        losses, found = of.factors(batch)
        contributions = found.first(count) if isinstance(found, OuterProducts) else [first_of(g, count) for g in found]
        del found  # nothing is left of a gradient once it was added
        yield contributions, [(count, float(losses[:count].double().sum()))]


def _summed(of: PerExample, units: Sequence[Unit], batches: Batches) -> UnitGradients:
    owners = torch.tensor([number for number, unit in enumerate(units) for _ in unit])
    rows = [row for unit in units for row in unit]
    sums = [torch.zeros(len(units), *p.shape, dtype=p.dtype, device=p.device) for p in of.parameters]
    losses = []
    for positions, batch in batches(rows):
        gradients, loss = _finite_rows(of, len(positions), batch)
        losses.append((len(positions), loss))
        for slots, number in _rounds_of_slots(owners[torch.as_tensor(positions)]):
            for total, gradient in zip(sums, gradients, strict=True):
                total[number.to(total.device)] += gradient[slots.to(total.device)]
    return list(sums), losses


def _rounds_of_slots(owners: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield slots of a batch with their units: the first row of each unit, then the second, …; no unit twice at a time."""
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
    """Return the gradients of the filled slots, zero for a row without a finite one, and the sum of the rows' losses."""
    losses, whole = of.gradients(batch)
    gradients = [g[:rows] for g in whole]
    finite = torch.stack([g.reshape(rows, -1).isfinite().all(dim=1) for g in gradients]).all(dim=0)
    for g in gradients:
        g[~finite] = 0.0
    return gradients, float(losses[:rows].double().sum())
