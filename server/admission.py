"""Whether an update may enter the model. The coordinator trusts nobody: what is not as agreed is refused, with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from cotune.models.adapter import Adapter
from cotune.strategies.updates import Update, not_finite

__all__ = ["most_bytes", "reason_to_refuse"]

_MOST_LOSS = 1e6  # nats: no model that trains at all is so wrong, and powers of more would overflow


def reason_to_refuse(
    update: Update,
    *,
    organisation: str,
    round: int,
    shapes: Mapping[str, Tensor],
    max_norm: float,
    noise_needed: bool = False,
    smaller: Sequence[Adapter] = (),
    loss_needed: bool = False,
    statistics: Mapping[str, tuple[int, ...]] | None = None,
    steps_of: Callable[[int], int] | None = None,
    most_steps: int | None = None,
    examples: tuple[int, int] | None = None,
    received: str | None = None,
    told: Collection[str] | None = None,
) -> str | None:
    """What is wrong with an update, in words; None when it may enter.

    shapes: the parameters that the round shares, with their tensors. noise_needed: every update must state its noise, above 0.
    loss_needed: and tell its loss. smaller: adapters that may come with a smaller rank. statistics: the arrays that the fusion
    wants beside the delta, with their shapes. steps_of: examples -> steps, where these follow from those. most_steps: the plan's.
    examples: between which numbers the declared one must be. received: the digest of what the round was trained from. told: the
    names of what may be told beside the update; None: whatever.
    """
    if update.organisation != organisation:
        return f"it is from {update.organisation[:80]}, expected {organisation}"
    if update.round != round:
        return f"it is for round {update.round}, expected {round}"
    if update.examples < 1:
        return f"it declares {update.examples} examples, expected at least 1"
    if examples is not None and not examples[0] <= update.examples <= examples[1]:
        return f"it declares {update.examples} examples, expected {examples[0]} to {examples[1]}"
    if received is not None and update.received != received:
        return f"it was trained from another model ({update.received[:12]}), expected that of this round ({received[:12]})"
    if steps_of is not None and update.steps != steps_of(update.examples):
        return f"it states {update.steps} steps, expected {steps_of(update.examples)} with {update.examples} examples"
    if most_steps is not None and not 1 <= update.steps <= most_steps:
        return f"it states {update.steps} steps, expected 1 to {most_steps}"
    surplus = sorted(update.told.keys() - set(told)) if told is not None else []
    if surplus:
        return f"it tells {surplus[0][:80]!r}, which the plan does not ask for"
    return (
        _wrong_tensors(update.delta, shapes, smaller)
        or _wrong_values(update.delta, max_norm)
        or _wrong_noise(update, needed=noise_needed)
        or (_wrong_loss(update) if loss_needed else None)
        or _wrong_statistics(update.statistics, statistics or {})
    )


def most_bytes(sent: int, statistics: Mapping[str, tuple[int, ...]]) -> int:
    """How large an answer may be: four times the request and the arrays that are asked for beside the delta, and 1 MiB."""
    return 4 * (sent + sum(4 * math.prod(shape) for shape in statistics.values())) + 2**20


def _wrong_tensors(delta: Mapping[str, Tensor], shapes: Mapping[str, Tensor], smaller: Sequence[Adapter]) -> str | None:
    if delta.keys() != shapes.keys():
        extra, lacking = sorted(delta.keys() - shapes.keys()), sorted(shapes.keys() - delta.keys())
        return f"it has {len(extra)} parameters too many and lacks {len(lacking)} ({', '.join([*extra, *lacking][:3])[:200]})"
    expected = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
    for adapter in smaller:
        expected |= _of_its_rank(adapter, delta, expected)
    for name, tensor in delta.items():
        if tuple(tensor.shape) != expected[name]:
            return f"{name} has the shape {tuple(tensor.shape)}, expected {expected[name]}"
    return None


def _of_its_rank(
    adapter: Adapter, delta: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes that an adapter's factors must have by the rank that they came with; nothing where that is no rank."""
    axes = {adapter.a: 0, adapter.b: 1}
    axes = {name: axis for name, axis in axes.items() if name in delta}
    rank = min((delta[name].shape[axis] for name, axis in axes.items() if delta[name].dim() == 2), default=0)
    if not 1 <= rank <= adapter.rank:
        return {}
    return {name: tuple(rank if i == axis else n for i, n in enumerate(expected[name])) for name, axis in axes.items()}


def _wrong_values(delta: Mapping[str, Tensor], max_norm: float) -> str | None:
    if not_finite(delta):
        return "it has values that are not finite"
    norm = math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in delta.values()))
    return f"its norm is {norm:.3g}, expected at most {max_norm:g}" if norm > max_norm else None


def _wrong_noise(update: Update, *, needed: bool) -> str | None:
    """A stated noise is believed: who states too little counts for more, but for no more than a thousandth of the
    median noise would."""
    stated = update.noise_variance
    if stated is None:
        return "it does not state the noise that its privacy added, which the weighting of the plan needs" if needed else None
    if stated.keys() != update.delta.keys():
        return f"it states noise for {len(stated)} parameters, expected it for the {len(update.delta)} of its delta"
    wrong = [n for n, v in stated.items() if not 0 <= v < math.inf or (needed and v == 0)]
    more = "more than 0" if needed else "0 or more"
    return f"it states the noise variance {stated[wrong[0]]} for {wrong[0]}, expected a finite number, {more}" if wrong else None


def _wrong_loss(update: Update) -> str | None:
    if "loss" not in update.told:
        return "it does not tell the loss that the strategy of the plan needs"
    loss = update.told["loss"]
    return None if 0 <= loss <= _MOST_LOSS else f"it tells a loss of {loss:g}, expected 0 to {_MOST_LOSS:g}"


def _wrong_statistics(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    if found.keys() != expected.keys():
        extra, lacking = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
        return f"it has {len(extra)} arrays too many and lacks {len(lacking)} ({', '.join([*extra, *lacking][:3])[:200]})"
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected[name]:
            return f"{name} has the shape {tuple(tensor.shape)}, expected {expected[name]}"
        squares = tensor.diagonal() if name.startswith("gram/") else tensor
        if not bool(tensor.isfinite().all()) or bool((squares < 0).any()):
            return f"{name} has values that no sum of squares has: expected finite ones, 0 or more"
    return None
