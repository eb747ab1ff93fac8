"""What the policy of a new site says to a plan: the rules that decline it, and what a smaller ε of the site's own would bring."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cotune.client.budget import budget_of, noise_multiplier, planned_charges
from cotune.client.consent import broken_rules
from cotune.models.errors import PrivacyError
from cotune.plan.schema import Plan
from cotune.privacy.accounting import epsilon
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.policy import BudgetRules, Policy
from cotune.simulations.expected import Member

_BUDGET = "budget.epsilon_per_run"


@dataclass(frozen=True)
class Refusal:
    """A rule of a new policy that declines the plan. organisations: whose; all of them where the plan alone decides."""

    rule: str
    problem: str
    organisations: tuple[str, ...]


@dataclass(frozen=True)
class OwnBound:
    """An organization that joins with its own, smaller ε. noise_multiplier: σ. epsilon: what its run spends."""

    organisation: str
    noise_multiplier: float
    epsilon: float


@dataclass(frozen=True)
class NewPolicy:
    """The answer of a policy that nobody has changed.

    Attributes:
        to_fill_in: Rules that allow nothing until an organization has named something in them.
        refused: The other rules that decline the plan.
        own_epsilon: The ε for a run with which the plan is within the policy's bound; None where it is already.
        bounds: What follows from it, for each organization that can join so.
    """

    to_fill_in: tuple[str, ...]
    refused: tuple[Refusal, ...]
    own_epsilon: float | None
    bounds: tuple[OwnBound, ...]


def new_policy(plan: Plan, members: Sequence[Member]) -> NewPolicy:
    """Return what new policies say to a plan whose base model is pinned."""
    found: dict[tuple[str, str], list[str]] = {}
    for member in members:
        for broken in broken_rules(plan, Policy(), member.public):
            found.setdefault((broken.rule, broken.problem), []).append(member.name)
    refused = tuple(Refusal(rule, problem, tuple(names)) for (rule, problem), names in found.items())
    empty = set(_empty_lists())
    own = BudgetRules().epsilon_per_run if any(each.rule == _BUDGET for each in refused) else None
    return NewPolicy(
        tuple(dict.fromkeys(each.rule for each in refused if each.rule in empty)),
        tuple(each for each in refused if each.rule not in empty),
        own,
        () if own is None else tuple(_bounds(plan, members, own)),
    )


def _empty_lists() -> Iterable[str]:
    """Rules that a new policy leaves to be filled in."""
    training = Policy().training
    return [f"training.{rule}" for rule in type(training).model_fields if getattr(training, rule) == ()]


def _bounds(plan: Plan, members: Sequence[Member], own: float) -> Iterator[OwnBound]:
    if not isinstance(plan.privacy, RecordPrivacy):
        return
    policy = Policy(budget=BudgetRules(own_epsilon=own))
    found = {public: _spent(plan, plan.privacy, policy, public) for public in dict.fromkeys(m.public for m in members)}
    for member in members:
        spent = found[member.public]
        if spent is not None:
            yield OwnBound(member.name, *spent)


def _spent(plan: Plan, privacy: RecordPrivacy, policy: Policy, examples: int) -> tuple[float, float] | None:
    """σ and ε of a run; None where another rule does not let the organization join."""
    try:
        budget = budget_of(privacy, policy, examples)
        sigma = noise_multiplier(plan, policy, budget, examples, 1)
    except PrivacyError:
        return None
    return sigma, epsilon(planned_charges(plan, policy, sigma, examples), budget.delta)
