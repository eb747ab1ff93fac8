"""Checks of weightings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cotune.strategies.aggregator import Aggregator
from cotune.strategies.conformance.checks import Check, Problems, differing, refusal
from cotune.strategies.conformance.samples import Case
from cotune.strategies.registry import get_builtin_components
from cotune.strategies.types import Update

Weight = float | Mapping[str, float]


def _weigh(case: Case, updates: Sequence[Update] | None = None) -> list[Weight]:
    """Return the weights in the order of the updates."""
    given = list(case.updates if updates is None else updates)
    context: dict[str, Any] = {"context": case.context} if case.info.needs_context else {}
    if case.info.sees_all:
        return list(case.info.build(given, **case.parameters, **context))
    return [case.info.build(update, **case.parameters, **context) for update in given]


def _values(weight: Weight) -> list[float]:
    return list(weight.values()) if isinstance(weight, Mapping) else [weight]


def _finite(case: Case) -> Problems:
    weights = _weigh(case)
    if len(weights) != len(case.updates):
        yield f"{len(weights)} weights for {len(case.updates)} updates"
    values = [value for weight in weights for value in _values(weight)]
    wrong = [v for v in values if not isinstance(v, int | float) or isinstance(v, bool) or not 0 <= v < math.inf]
    if wrong:
        yield f"a weight is {wrong[0]!r}, expected a finite number, 0 or more"
    if not any(values):
        yield "every weight is 0, expected one above"


def _names(case: Case) -> Problems:
    for weight, update in zip(_weigh(case), case.updates, strict=True):
        if isinstance(weight, Mapping) != case.info.needs.by_parameter:
            yield f"by_parameter = {case.info.needs.by_parameter} is not what it does: a weight is {weight!r:.60}"
        if isinstance(weight, Mapping) and weight.keys() != update.delta.keys():
            yield f"weights for {sorted(weight)}, expected {sorted(update.delta)}"


def _order(case: Case) -> Problems:
    forth = _weigh(case)
    back = _weigh(case, list(reversed(case.updates)))
    for one, other in zip(forth, reversed(back), strict=True):
        close = (math.isclose(a, b, rel_tol=1e-9) for a, b in zip(_values(one), _values(other), strict=True))
        if not all(close):
            yield f"a weight depends on the order of the updates: {one!r:.40} and {other!r:.40}"


def _again(case: Case) -> Problems:
    if _weigh(case) != _weigh(case):
        yield "the same updates get other weights"


def _unchanged(case: Case) -> Problems:
    used = case.fresh()
    _weigh(used)
    for before, after in zip(case.updates, used.updates, strict=True):
        wrong = differing(after.delta, before.delta, exact=True)
        if wrong or replace(after, delta={}, statistics={}) != replace(before, delta={}, statistics={}):
            yield f"it changes an update that it was given{': ' + wrong if wrong else ''}"


def _single(case: Case) -> Problems:
    """A round's only update gets a weight above 0."""
    weights = _weigh(case, case.updates[:1])
    if not all(v > 0 for weight in weights for v in _values(weight)):
        yield f"the only update of a round gets the weight {weights[0]!r:.40}, expected one above 0"


def _not_finite(case: Case) -> Problems:
    first = case.updates[0]
    disclosed = [replace(first, disclosures=dict.fromkeys(first.disclosures, math.nan))] if first.disclosures else []
    noise = [replace(first, noise_variance=dict.fromkeys(first.delta, math.nan))] if first.noise_variance else []
    for broken in (*disclosed, *noise):
        if not refusal(partial(_round, case, [broken, *case.updates[1:]])):
            yield "an update discloses NaN and gets a weight: expected it to be refused"


def _round(case: Case, updates: Sequence[Update]) -> None:
    """Run a round with the real aggregator and its check of weights, and the mean as fusion."""
    driver = Aggregator((case.info, case.parameters), (get_builtin_components("fusion")["mean"], {}), case.context)
    for update in updates:
        driver.add(update)
    driver.result()


CHECKS: Sequence[Check] = (
    Check("gives finite weights, 0 or more", _finite),
    Check("weighs by parameter if it says so", _names),
    Check("does not depend on the order", _order),
    Check("gives the same again", _again),
    Check("leaves its inputs alone", _unchanged),
    Check("gives a single update a say", _single),
    Check("refuses what is not a number", _not_finite, lambda info: bool({"loss", "noise"} & set(info.needs.sends))),
)
