"""Checks of client terms: the organization's part and the server's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cotune.strategies.conformance.checks import Check, Problems, checkpointed, differing, wrong_names, wrong_shapes
from cotune.strategies.conformance.samples import Case
from cotune.strategies.types import Aggregate, Delta

Tensors = Mapping[str, Tensor]


def _fused(case: Case, scale: float = 1.0) -> Aggregate:
    first = case.updates[0].delta
    return Aggregate({name: scale * tensor.to(torch.float64) for name, tensor in first.items()}, len(case.updates), 1.0)


def _folded(case: Case, memory: Tensors | None = None) -> tuple[Delta, Tensors]:
    found: tuple[Delta, Tensors] = case.build().fold(_fused(case), memory or {}, case.context)
    return found


def _kept(case: Case, sent: Tensors | None = None) -> Tensors:
    found: Tensors = case.build().keep({}, case.updates[0].delta, sent or {}, case.context.local)
    return found


def _harmless(case: Case) -> Problems:
    """In the very first step of an organization there is no state, so that nothing is corrected."""
    for name, parameter in case.context.state.items():
        more = case.build().correction(name, parameter.clone(), parameter.clone(), None, None)
        if more is not None and bool(more.any()):
            yield f"it corrects the gradient of {name} at the received model, without anything kept or sent"
    delta, _ = case.build().fold(_fused(case, 0.0), {}, case.context)
    if any(bool(d.any()) for d in delta.values()):
        yield "a delta of 0 is not 0 any more, without anything remembered"


def _corrections(case: Case, parameter: Tensor) -> list[Tensor | None]:
    tensors = [None, torch.ones_like(parameter)]
    given = [(kept, sent) for kept in tensors for sent in tensors]
    return [case.build().correction("x", parameter, 0.5 * parameter, kept, sent) for kept, sent in given]


def _formed(case: Case) -> Problems:
    """A correction follows its parameter to any device: operations with tensors of another one fail on the meta device."""
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("meta", torch.float32)):
        parameter = torch.ones(3, 2, device=device, dtype=dtype)
        for more in _corrections(case, parameter):
            if more is None:
                continue
            if (more.shape, more.dtype, more.device) != (parameter.shape, parameter.dtype, parameter.device):
                yield f"a correction is {more.dtype} {tuple(more.shape)} on {more.device}, expected {dtype} (3, 2) on {device}"


def _unchanged(case: Case) -> Problems:
    given = [torch.full((3, 2), value) for value in (4.0, 3.0, 2.0, 1.0)]
    case.build().correction("x", *given)
    if any(not bool((tensor == value).all()) for tensor, value in zip(given, (4.0, 3.0, 2.0, 1.0), strict=True)):
        yield "a correction changes what it is computed from"
    _, memory = _folded(case)
    fused = _fused(case)
    before = copy.deepcopy(dict(memory))
    case.build().fold(fused, memory, case.context)
    wrong = differing(fused.delta, _fused(case).delta, exact=True) or differing(memory, before, exact=True)
    if wrong:
        yield f"the server's half changes what it was given: {wrong}"


def _states(case: Case) -> Problems:
    """State has the names and shapes of parameters, and is declared."""
    delta, memory = _folded(case)
    yield from wrong_shapes(delta, case.context.state)
    yield from wrong_names(delta, case.sent, case.sent)
    sent = case.build().send(memory)
    for what, tensors, stated in (
        ("client_state", _kept(case, sent), case.info.needs.client_state),
        ("receives", sent, case.info.needs.receives),
    ):
        yield from wrong_shapes(tensors, case.context.state)
        yield from wrong_names(tensors, set(), case.sent)
        if bool(tensors) != stated:
            yield f"needs.{what} = {stated} is not what it does"


def _memory(case: Case) -> Problems:
    _, memory = _folded(case)
    straight = _folded(case, memory)
    resumed = _folded(case, checkpointed(memory))
    wrong = differing(resumed[0], straight[0], exact=True) or differing(resumed[1], straight[1], exact=True)
    if wrong:
        yield f"the server's half is another one after a checkpoint: {wrong}"
    kept = _kept(case)
    delta = case.updates[1].delta
    keep: Any = case.build().keep
    again = [keep(held, delta, case.build().send(memory), case.context.local) for held in (kept, checkpointed(kept))]
    wrong = differing(again[1], again[0], exact=True)
    if wrong:
        yield f"the organization's half is another one after it was stored: {wrong}"


def _new_parameters(case: Case) -> Problems:
    """A later stage may train parameters that no earlier stage trained."""
    one = min(case.sent)
    fused = _fused(case)
    rest = replace(fused, delta={name: d for name, d in fused.delta.items() if name != one})
    _, memory = case.build().fold(rest, {}, case.context)
    delta, _ = _folded(case, memory)
    yield from wrong_shapes(delta, case.context.state)
    kept = case.build().keep({}, rest.delta, {}, case.context.local)
    yield from wrong_shapes(case.build().keep(kept, case.updates[0].delta, {}, case.context.local), case.context.state)


CHECKS: Sequence[Check] = (
    Check("is harmless at the start", _harmless),
    Check("corrects in the shape, type and place of the parameter", _formed),
    Check("leaves its inputs alone", _unchanged),
    Check("keeps, sends and folds what it says", _states),
    Check("bears parameters that come later", _new_parameters),
    Check("remembers through a checkpoint", _memory),
)
