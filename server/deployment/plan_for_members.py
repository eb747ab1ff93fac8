"""Adapt a plan to a federation: use the robust fusion if the plan names none, and check agreed numbers of records."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.errors import RunError
from cotune.plan.plan import Plan
from cotune.server.deployment.members import Member
from cotune.strategies.compatibility import find_problem
from cotune.strategies.fusions.robust.robust import FEWEST

_BY_COUNT = {"examples", "tilted"}  # weightings that use the declared number of records


def with_robust_default(plan: Plan) -> Plan:
    """Return the plan with the robust fusion, unless it names a fusion or a strategy, or is incompatible with it."""
    if "fusion" in plan.strategy.model_fields_set:
        return plan
    given = plan.strategy.model_dump(exclude={"fusion", "sends"})
    strategy = type(plan.strategy).model_validate({**given, "fusion": "robust"})
    return plan if find_problem(strategy, plan.facts) else plan.model_copy(update={"strategy": strategy})


def check_example_bounds(plan: Plan, members: Sequence[Member]) -> None:
    """Raise RunError if bounds on the number of records are agreed for some members but not for all."""
    agreed, others = _agreed(members)
    if _by_count(plan) and agreed and others:
        raise RunError(
            f"the numbers of records are agreed on with {', '.join(agreed)[:200]} and not with {', '.join(others)[:200]}: their"
            " weights could not be compared; expected `cotune server invite --examples LOW:HIGH` for all of them, or"
            ' strategy.weighting = "uniform"',
            code="run.mixed_record_counts",
        )


def build_notes(plan: Plan, members: Sequence[Member]) -> list[str]:
    """Return notes for the coordinator before a run starts."""
    notes = []
    if _by_count(plan) and not _agreed(members)[0]:
        notes.append(
            "no number of records is agreed on: each organization is believed what it states; agree with `cotune server invite"
            " --examples LOW:HIGH`"
        )
    if plan.strategy.fusion.name == "robust" and len(members) < FEWEST:
        notes.append(
            f"{len(members)} organizations cannot tell which of them lies: a poisoned update moves the model; {FEWEST} can"
        )
    if plan.strategy.fusion.name == "mean" and plan.client_privacy is None:
        notes.append("the fusion mean lets one organization move the model wherever it likes, within the norm that is allowed")
    return notes


def _by_count(plan: Plan) -> bool:
    return plan.strategy.weighting.name in _BY_COUNT


def _agreed(members: Sequence[Member]) -> tuple[list[str], list[str]]:
    names = {known: [m.name for m in members if (m.examples is not None) == known] for known in (True, False)}
    return names[True], names[False]
