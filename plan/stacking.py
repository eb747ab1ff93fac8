"""Plans of stacking, whose base model is a fused one: what they support, what they mean, and what their ε does not cover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cotune.models.config import MemberConfig
from cotune.plan.tables import PlanTables


def find_stacking_problems(plan: PlanTables, modes: Sequence[str]) -> Iterator[str]:
    """Yield, in words, what a plan of stacking cannot have: a meta-model on the members' predictions is all that is trained.

    Args:
        plan: Its tables.
        modes: What its stages train.
    """
    if not plan.model.members:
        return
    if plan.task != "sequence-classification":
        yield f"[[model.members]] is for task = sequence-classification, got {plan.task}: leave it out"
    if any(mode != "head" for mode in modes):
        yield "[[model.members]] names models that nobody trains: expected train = head in all rounds, or a single base model"
    if plan.collaboration != "parameters":
        yield '[[model.members]] is for a meta-model that all have in common: expected collaboration = "parameters"'
    others = {"model.feature": plan.model.feature is not None, "model.pooling": plan.model.pooling != "auto"}
    for key, found in others.items():
        if found:
            yield f"{key} says what a head reads of one encoder, and here it reads what members predict: leave it out"


def explain_stacking(members: Sequence[MemberConfig], *, private: bool) -> str:
    """Return one sentence about what is stacked, what leaves, and what it costs.

    Args:
        members: At least one.
        private: Whether the plan has record-level privacy.
    """
    each = ", ".join(
        f"{member.name}'s (NO privacy: handed over as it is, may reveal single records to all)"
        if member.handed_over
        else f"{member.name}'s (ε = {member.epsilon:g} at δ = {member.delta:g})"
        for member in members
    )
    cost = (
        "under the plan's ε, which a ledger composes with what it has charged for the same records before"
        if private
        else "and NO noise protects it, so that single records may show"
    )
    return f"stacking: {len(members)} frozen models predict: {each}; a meta-model on that is trained, and leaves, {cost}"


def list_uncovered(members: Sequence[MemberConfig]) -> tuple[str, ...]:
    """Return what no ε of a plan with these members bounds, in words."""
    if not members:
        return ()
    return ("the earlier training of the stacked members, each with an ε of its own, or with none where it was handed over",)
