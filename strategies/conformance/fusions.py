"""Checks of fusions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cotune.strategies.conformance.checks import Check, Problems, checkpointed, differing, refusal, wrong_names, wrong_shapes
from cotune.strategies.conformance.samples import Case, sample
from cotune.strategies.registry import Visibility
from cotune.strategies.sums import total
from cotune.strategies.types import Aggregate, Update, WeightedUpdate


def _result(case: Case) -> Problems:
    delta = case.fuse().delta
    yield from _shaped(case, delta)
    for name, tensor in delta.items():
        if tensor.dtype != torch.float64:
            yield f"{name} is {tensor.dtype}, expected torch.float64"


def _shaped(case: Case, delta: Mapping[str, Tensor]) -> Problems:
    yield from wrong_shapes(delta, case.context.state)
    yield from wrong_names(delta, case.sent, case.sent | _rewritten(case))


def _rewritten(case: Case) -> set[str]:
    return {getattr(adapter, kind) for adapter in case.context.adapters for kind in case.info.needs.rewrites}


def _order(case: Case) -> Problems:
    wrong = differing(case.fuse(list(reversed(case.updates))).delta, case.fuse().delta)
    if wrong:
        yield f"the result depends on the order of the updates: {wrong}"


def _again(case: Case) -> Problems:
    wrong = differing(case.fuse().delta, case.fuse().delta, exact=True)
    if wrong:
        yield f"the same updates give another result: {wrong}"


def _unchanged(case: Case) -> Problems:
    used = case.fresh()
    used.fuse()
    for before, after in zip(case.updates, used.updates, strict=True):
        wrong = differing(after.delta, before.delta, exact=True) or differing(after.statistics, before.statistics, exact=True)
        if wrong:
            yield f"it changes an update that it was given: {wrong}"
    wrong = differing(used.context.state, case.context.state, exact=True)
    if wrong:
        yield f"it changes the model that it was given: {wrong}"


def _scale(case: Case) -> Problems:
    twice = [replace(u, delta={name: 2 * tensor for name, tensor in u.delta.items()}) for u in case.updates]
    expected = {name: 2 * tensor for name, tensor in case.fuse().delta.items()}
    wrong = differing(case.fuse(twice).delta, expected)
    if wrong:
        yield f"doubled deltas do not give the doubled result: {wrong}; expected homogeneous=False"


def _identical(case: Case) -> Problems:
    first = case.updates[0]
    alike = [replace(first, organization=u.organization) for u in case.updates]
    found = case.fuse(alike).delta
    expected = {name: tensor.to(torch.float64) for name, tensor in first.delta.items()}
    wrong = differing({name: found[name] for name in found if name in expected}, expected)
    if wrong:
        yield f"identical deltas do not give that delta: {wrong}; expected idempotent=False"


def _no_weight(case: Case) -> Problems:
    first = case.updates[0]
    more = replace(first, organization="weightless", delta={name: -3 * tensor for name, tensor in first.delta.items()})
    found = case.fuse([*case.updates, more], weights={**case.weights, "weightless": 0.0}).delta
    wrong = differing(found, case.fuse().delta)
    if wrong:
        yield f"an update of weight 0 changes the result: {wrong}; expected weights=False, or its weight to count"


def _weights_unused(case: Case) -> Problems:
    uneven = {u.organization: 1.0 + i for i, u in enumerate(case.updates)}
    wrong = differing(case.fuse(weights=uneven).delta, case.fuse().delta)
    if wrong:
        yield f"it says weights=False, and weights change the result: {wrong}"


def _by_parameter(case: Case) -> Problems:
    each = {u.organization: dict.fromkeys(u.delta, case.weights[u.organization]) for u in case.updates}
    wrong = differing(case.fuse(weights=each).delta, case.fuse().delta)
    if wrong:
        yield f"the same weight for every parameter is not that weight for the update: {wrong}; expected by_parameter=False"


def _other_keys(case: Case) -> Problems:
    """An organization sends no head: the head is fused over the others, or the round fails with an error of cotune's own."""
    lacking = _without(case.updates[-1], "head.weight" if "head.weight" in case.sent else sorted(case.sent)[-1])
    given = [*case.updates[:-1], lacking]
    if not refusal(lambda: case.fuse(given)):
        yield from _shaped(case, case.fuse(given).delta)


def _without(update: Update, name: str) -> Update:
    held = {n: t for n, t in update.statistics.items() if not n.endswith(f"/{name}")}
    return replace(update, delta={n: t for n, t in update.delta.items() if n != name}, statistics=held)


def _least(case: Case) -> Problems:
    least = case.info.min_updates(**case.parameters)
    yield from _shaped(case, case.fuse(case.updates[:least]).delta)


def _zeros(case: Case) -> Problems:
    """Organizations send updates of zeros where their records have nothing to teach: one of them, and all."""
    still = [replace(u, delta={n: torch.zeros_like(t) for n, t in u.delta.items()}) for u in case.updates]
    yield from _shaped(case, case.fuse([still[0], *case.updates[1:]]).delta)
    yield from _shaped(case, case.fuse(still).delta)


def _not_finite(case: Case) -> Problems:
    """Values that are not finite are refused, never repaired silently."""
    for name, broken in _broken(case.updates[0]).items():
        if not refusal(partial(case.fuse, [broken, *case.updates[1:]])):
            yield f"{name} of an update is not a number, and the round goes on: expected it to be refused"


def _broken(update: Update) -> dict[str, Update]:
    nan = float("nan")
    found = {"the delta": replace(update, delta={n: torch.full_like(t, nan) for n, t in update.delta.items()})}
    if update.disclosures:
        found["the loss"] = replace(update, disclosures=dict.fromkeys(update.disclosures, nan))
    if update.statistics:
        found["a statistic"] = replace(update, statistics={n: torch.full_like(t, nan) for n, t in update.statistics.items()})
    return found


def _visible(case: Case) -> Problems:
    """As under secure aggregation: every organization contributes by itself, with a generator that sees no other's update, and
    the server's generator gets sums alone. It must come to what the driver comes to.
    """
    if not inspect.isgeneratorfunction(case.info.build):
        yield f"it says that the server needs {case.info.needs.visibility}, and takes the updates: expected a generator"
        return
    fused, passes, keys = _apart(case)
    if passes > 1 and case.info.needs.visibility == Visibility.SUM:
        yield f"it asks for {passes} sums, and says that it needs one: expected Visibility.SUM_2PASS"
    if any(shapes != keys[0] for shapes in keys):
        yield "contributions of different organizations are kept apart: expected the same names and shapes from everybody"
    wrong = differing(fused.delta, case.fuse().delta)
    if wrong:
        yield f"the sums alone give another result, so that it has looked at single updates: {wrong}"


def _apart(case: Case) -> tuple[Aggregate, int, list[Any]]:
    """(result, passes, names and shapes of every organization's contributions)."""
    weighed = [WeightedUpdate(u, case.weights[u.organization], case.context.state) for u in case.updates]
    generators = [_generator(case) for _ in range(len(weighed) + 1)]
    contributions = [next(generator) for generator in generators]
    keys: list[Any] = [[] for _ in weighed]
    for passes in range(1, 1000):
        sums: dict[str, Tensor] = {}
        for contribute, update, seen in zip(contributions[1:], weighed, keys, strict=True):
            made = contribute(update)
            total(sums, made)
            seen.append(sorted((name, tuple(tensor.shape)) for name, tensor in made.items()))
        try:
            contributions = [generators[0].send(copy.deepcopy(sums))]
        except StopIteration as end:
            return end.value if isinstance(end.value, Aggregate) else Aggregate(end.value), passes, keys
        contributions += [generator.send(copy.deepcopy(sums)) for generator in generators[1:]]
    raise RuntimeError("it asks for sums without end")


def _generator(case: Case) -> Any:
    context = {"context": case.context} if case.info.needs_context else {}
    return case.info.build(**case.parameters, **context)


def _memory(case: Case) -> Problems:
    """The next round is the same, bit for bit, after what is remembered was written to a checkpoint and read."""
    memory = case.fuse().memory
    later = replace(case.context, round=case.context.round + 1)
    through = case.fuse(context=replace(later, memory=checkpointed(memory)))
    wrong = differing(through.delta, case.fuse(context=replace(later, memory=dict(memory))).delta, exact=True)
    if wrong:
        yield f"what it remembers does not survive a checkpoint: {wrong}"
    wrong = differing(through.delta, case.fuse(context=replace(later, memory=checkpointed(memory))).delta, exact=True)
    if wrong:
        yield f"it remembers more than the memory that it returns: {wrong}"


def _smaller_ranks(case: Case) -> Problems:
    """An organization with rank 2 sends the first two rows of A and the first two columns of B."""
    info = case.info
    if not case.context.adapters:
        case = sample(replace(info, needs=replace(info.needs, adapters=("ab",))), case.parameters)
    smaller = replace(case.updates[-1], delta=_first_ranks(case, case.updates[-1].delta))
    yield from _shaped(case, case.fuse([*case.updates[:-1], smaller]).delta)


def _first_ranks(case: Case, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    a, b = ({getattr(adapter, kind) for adapter in case.context.adapters} for kind in ("a", "b"))
    return {name: tensor[:2] if name in a else tensor[:, :2] if name in b else tensor for name, tensor in delta.items()}


CHECKS: Sequence[Check] = (
    Check("gives a finite delta of every parameter, in float64", _result),
    Check("sees no more than it says", _visible, lambda info: info.needs.visibility != Visibility.PER_CLIENT),
    Check("does not depend on the order", _order),
    Check("gives the same again", _again),
    Check("leaves its inputs alone", _unchanged),
    Check("scales with the deltas", _scale, lambda info: info.homogeneous),
    Check("keeps what all agree on", _identical, lambda info: info.idempotent),
    Check("gives weight 0 no say", _no_weight, lambda info: info.needs.weights),
    Check("uses no weights, as it says", _weights_unused, lambda info: not info.needs.weights),
    Check("follows weights by parameter", _by_parameter, lambda info: info.needs.by_parameter),
    Check("bears organizations with other parameters", _other_keys),
    Check("works with the least number of updates", _least),
    Check("bears updates of zeros", _zeros),
    Check("bears smaller ranks", _smaller_ranks, lambda info: info.needs.mixed_ranks),
    Check("refuses what is not a number", _not_finite),
    Check("remembers through a checkpoint", _memory),
)
