"""Checks of server optimizers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cotune.strategies.conformance.checks import Check, Problems, checkpointed, differing, wrong_names, wrong_shapes
from cotune.strategies.conformance.samples import Case
from cotune.strategies.sums import norm
from cotune.strategies.types import Aggregate

State = Mapping[str, Tensor]


def _fused(case: Case, scale: float = 1.0) -> Aggregate:
    """Return the mean of the case's deltas, scaled; their norms are a few times that of the mean."""
    count = len(case.updates)
    deltas = [{name: scale * tensor.to(torch.float64) for name, tensor in u.delta.items()} for u in case.updates]
    mean = {name: sum((d[name] for d in deltas), torch.zeros(())) / count for name in deltas[0]}
    return Aggregate(mean, count, sum(norm(d) ** 2 for d in deltas) / count)


def _step(case: Case, fused: Aggregate, memory: State | None = None, state: State | None = None) -> tuple[State, State]:
    found: tuple[State, State] = case.build().step(state or dict(case.context.state), fused, memory or {}, case.context)
    return found


def _formed(case: Case) -> Problems:
    for dtype in (torch.float32, torch.bfloat16):
        state = {name: tensor.to(dtype) for name, tensor in case.context.state.items()}
        moved, memory = _step(case, _fused(case), state=state)
        yield from wrong_shapes(moved, state)
        yield from wrong_names(moved, set(state), set(state))
        kept = [name for name in moved if moved[name].dtype != dtype]
        if kept:
            yield f"{kept[0]} is {moved[kept[0]].dtype}, expected {dtype} as it was"
        served = case.build().serve(moved, memory)
        yield from wrong_shapes(served, state)
        yield from wrong_names(served, set(state), set(state))


def _still(case: Case) -> Problems:
    moved, _ = _step(case, _fused(case, 0.0))
    wrong = differing(moved, case.context.state)
    if wrong:
        yield f"a delta of 0 moves the model at the start: {wrong}"


def _forward(case: Case) -> Problems:
    """The first step goes along D, not against it: D already points along the negative gradient."""
    fused = _fused(case)
    moved, _ = _step(case, fused)
    gain = sum(float(((moved[n] - case.context.state[n]).double() * d).sum()) for n, d in fused.delta.items())
    if not gain > 0:
        yield f"the first step does not go along the delta: their product is {gain:.3g}, expected it above 0"


def _untouched(case: Case) -> Problems:
    """Parameters without a delta stay as they are; they may get one in a later stage."""
    fused = _fused(case)
    one = min(case.sent)
    rest = replace(fused, delta={name: d for name, d in fused.delta.items() if name != one})
    moved, memory = _step(case, rest)
    wrong = differing({one: moved[one]}, {one: case.context.state[one]}, exact=True)
    if wrong:
        yield f"a parameter without a delta moves: {wrong}"
    later, _ = _step(case, fused, memory, moved)
    yield from wrong_shapes(later, case.context.state)


def _unchanged(case: Case) -> Problems:
    _, memory = _step(case, _fused(case))
    given = copy.deepcopy((dict(case.context.state), _fused(case), dict(memory)))
    kept = copy.deepcopy(given)
    _step(case, given[1], given[2], given[0])
    for what, after, before in (
        ("the model", given[0], kept[0]),
        ("the delta", given[1].delta, kept[1].delta),
        ("its memory", given[2], kept[2]),
    ):
        wrong = differing(after, before, exact=True)
        if wrong:
            yield f"it changes {what} in place: {wrong}"


def _memory(case: Case) -> Problems:
    moved, memory = _step(case, _fused(case))
    straight = _step(case, _fused(case, -0.5), memory, moved)
    resumed = _step(case, _fused(case, -0.5), checkpointed(memory), checkpointed(moved))
    for what, one, other in zip(("the model", "its memory"), resumed, straight, strict=True):
        wrong = differing(one, other, exact=True)
        if wrong:
            yield f"{what} is another one after a checkpoint: {wrong}"
    wrong = differing(case.build().serve(resumed[0], checkpointed(resumed[1])), case.build().serve(*straight), exact=True)
    if wrong:
        yield f"what it serves is another model after a checkpoint: {wrong}"


CHECKS: Sequence[Check] = (
    Check("keeps names, shapes and dtypes", _formed),
    Check("stands still without a delta", _still),
    Check("goes along the delta", _forward),
    Check("moves only what has a delta", _untouched),
    Check("leaves its inputs alone", _unchanged),
    Check("remembers through a checkpoint", _memory),
)
