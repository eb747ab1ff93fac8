"""Check whether an organization's policy allows a plan.

The policy overrules the plan: what is not allowed is not trained. No record is read for a plan that nobody has approved (see
`approvals`), unless the policy says `training.approval = "none"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cotune.errors import PolicyError
from cotune.models.device import limit_memory
from cotune.plan.plan import Plan
from cotune.privacy.config import RecordPrivacy, compute_delta
from cotune.privacy.policy import Policy


@dataclass(frozen=True)
class Violation:
    """A rule that a plan breaks.

    Attributes:
        rule: Its full key in policy.toml, such as "training.max_rounds".
        problem: What was found, and what was expected.
        suggested_value: A value of the rule that would allow the plan; None if none can be recommended.
    """

    rule: str
    problem: str
    suggested_value: Any = None


def check_consent(plan: Plan, policy: Policy, examples: int, hours: float = 0.0) -> None:
    """Check all rules of the policy.

    Args:
        plan: The plan.
        policy: Of the organization.
        examples: The public number of records.
        hours: Hours of training that the plan has taken so far.

    Raises:
        PolicyError: For the first rule that the plan breaks.
    """
    for broken in find_violations(plan, policy, examples, hours):
        raise PolicyError(broken.rule, broken.problem)


def check_plan(plan: Plan, policy: Policy) -> None:
    """Check the rules that do not depend on the records.

    They are checked before records are read, as even a failure to read them may reveal something about one.

    Raises:
        PolicyError: For the first rule that the plan breaks.
    """
    for broken in _of_plan(plan, policy, hours=0.0):
        raise PolicyError(broken.rule, broken.problem)


def check_base_model(plan: Plan, policy: Policy) -> None:
    """Raise PolicyError unless the policy allows the plan's base model."""
    for broken in _not_allowed(plan, policy):
        if broken.rule == "training.base_models":
            raise PolicyError(broken.rule, broken.problem)


def check_number(plan: Plan, policy: Policy, examples: int, declarable: tuple[int, int] | None) -> None:
    """Check that the coordinator would accept the public number of records, so that no training is wasted.

    Args:
        plan: The plan.
        policy: Of the organization.
        examples: The public number of records.
        declarable: The smallest and largest number in the coordinator's signed request; None: whatever the plan allows.

    Raises:
        PolicyError: If the coordinator would refuse it.
    """
    for broken in find_number_violations(plan, policy, examples, declarable):
        raise PolicyError(broken.rule, broken.problem)


def find_number_violations(plan: Plan, policy: Policy, examples: int, declarable: tuple[int, int] | None) -> Iterator[Violation]:
    """Yield the rule that leads to a public number of records which the coordinator does not accept.

    Args:
        plan: The plan.
        policy: Of the organization.
        examples: The public number of records.
        declarable: See `check_number`.
    """
    least, most = declarable or (1, plan.server.max_examples)
    most = min(most, plan.server.max_examples)
    if not least <= examples <= most:
        which = "disclosures.declared_examples" if policy.disclosures.example_count == "declared" else "it"
        yield Violation(
            "disclosures.example_count",
            f"{which} makes the number of records {examples}, and the coordinator takes {least} to {most} from this organization;"
            f" change {which}, or ask for another invitation (--examples)",
        )


def find_violations(plan: Plan, policy: Policy, examples: int, hours: float = 0.0) -> Iterator[Violation]:
    """Yield all rules that the plan breaks.

    Rules that depend on the number of records come last: if an earlier one declines, that reveals nothing about the number.

    Args:
        plan: The plan.
        policy: Of the organization.
        examples: The public number of records.
        hours: Hours of training that the plan has taken so far.
    """
    yield from _of_plan(plan, policy, hours)
    if isinstance(plan.privacy, RecordPrivacy):
        yield from _too_large_delta(plan.privacy, policy, examples)
    yield from _too_few(plan, policy, examples)


def _of_plan(plan: Plan, policy: Policy, hours: float) -> Iterator[Violation]:
    yield from _not_allowed(plan, policy)
    yield from _too_wide(plan, policy)
    yield from _too_long(plan, policy, hours)
    if isinstance(plan.privacy, RecordPrivacy):
        yield from _over_budget(plan.privacy, policy)
        if plan.strategy.compares_noise and not policy.disclosures.noise_level:
            name = plan.strategy.weighting.name
            yield Violation(
                "disclosures.noise_level",
                f"the plan weighs updates by their noise ({name}), expected a weighting that need not know it",
                True,
            )
        if plan.personal.keeps_copy and not plan.personal.noise and not policy.training.personal_without_noise:
            yield Violation(
                "training.personal_without_noise",
                "the plan trains your own copy of the model without noise, expected one with noise; where neither the copy nor"
                " what it predicts ever leaves you, set the rule to true",
                True,
            )
    elif policy.training.record_privacy:
        yield Violation(
            "training.record_privacy", "the plan says privacy = none, expected record-level differential privacy", False
        )
    yield from _handed_over(plan, policy)
    yield from _telling(plan, policy)
    yield from _undeclared(policy)


def _handed_over(plan: Plan, policy: Policy) -> Iterator[Violation]:
    """A member with a larger ε than this organization allows for a run of its own counts as one without privacy."""
    most = policy.budget.epsilon_per_run
    members = plan.model.members
    names = [
        f"{m.name}: {'none' if m.epsilon is None else f'ε = {m.epsilon:g}'}" for m in members if (m.epsilon or math.inf) > most
    ]
    if names and not policy.training.handed_over_members:
        yield Violation(
            "training.handed_over_members",
            f"the plan stacks models that were trained with too little privacy ({', '.join(names)}), expected members with an ε"
            f" of at most {most:g} (budget.epsilon_per_run)",
            True,
        )


def _telling(plan: Plan, policy: Policy) -> Iterator[Violation]:
    statistics = sorted({"fisher", "gram"} & set(plan.strategy.sends))
    if statistics and not policy.disclosures.statistics:
        yield Violation(
            "disclosures.statistics",
            f"the plan wants statistics of the records ({', '.join(statistics)}), expected one without them",
            True,
        )
    if "loss" in plan.strategy.sends and policy.disclosures.local_loss == "none":
        parts = ", ".join(part.name for _, part, info in plan.strategy.known_components() if "loss" in info.needs.sends)
        yield Violation(
            "disclosures.local_loss",
            f"the plan weighs updates by their loss ({parts}), expected a strategy that need not know it",
            "noised",
        )


def _not_allowed(plan: Plan, policy: Policy) -> Iterator[Violation]:
    rules = policy.training
    base = plan.model.base_hash
    asked: dict[str, list[str]] = {
        "tasks": [task.type for task in plan.tasks] or [plan.task],
        "base_models": [base or "a base model without a hash"],  # what is not allowed is not even fetched
        "train_modes": [stage.mode for stage in plan.stages],
        "units": [plan.privacy.unit] if isinstance(plan.privacy, RecordPrivacy) else [],
        "collaborations": [plan.collaboration],
        "weightings": [plan.strategy.weighting.name],
        "fusions": [plan.strategy.fusion.name],
        "client_terms": [] if plan.strategy.client_term is None else [plan.strategy.client_term.name],
    }
    for key, wanted in asked.items():
        allowed = getattr(rules, key)
        lacking = [] if "*" in allowed else [item for item in dict.fromkeys(wanted) if item not in allowed]
        for item in lacking:
            known = ", ".join(allowed) or "nothing so far"
            yield Violation(
                f"training.{key}",
                _promised(item, known)
                if key == "units"
                else f"the plan asks for {item}, expected one of: {known}; add it to the rule to allow it",
                None if key == "base_models" and base is None else [*allowed, *lacking],
            )


def _promised(unit: str, known: str) -> str:
    """Return why a plan must not promise its privacy to this unit."""
    problem = f"the plan promises its privacy to each {unit}, expected to each one of: {known}"
    if unit != "record":
        return f"{problem}; add it to the rule where it stands for a person"
    return f'{problem}; where each record is a person, add "record" to the rule, else ask for a plan with privacy.unit'


def _too_wide(plan: Plan, policy: Policy) -> Iterator[Violation]:
    own = policy.training.rank_for(plan.lora.rank)
    if plan.uses_lora and own < plan.lora.rank and not plan.mixed_ranks:
        yield Violation(
            "training.own_rank",
            f"the plan trains adapters of rank {plan.lora.rank} and takes no smaller ones, expected lora.smaller_ranks = true",
            plan.lora.rank,
        )


def _too_long(plan: Plan, policy: Policy, hours: float) -> Iterator[Violation]:
    rules = policy.training
    rounds = plan.rounds
    if rounds > rules.max_rounds:
        yield Violation("training.max_rounds", f"the plan has {rounds} rounds, expected at most {rules.max_rounds}", rounds)
    if hours >= rules.max_hours:
        problem = f"the plan has trained for {hours:.1f} hours, expected at most {rules.max_hours:g}"
        yield Violation("training.max_hours", problem, float(round(2 * hours)) or 1.0)


def missing_number_message() -> str:
    """Return what is wrong with a policy that wants to declare a number of records but does not give it."""
    return "the policy declares a number of records and gives none, expected disclosures.declared_examples near the true number"


def _undeclared(policy: Policy) -> Iterator[Violation]:
    if policy.disclosures.example_count == "declared" and policy.disclosures.declared_examples is None:
        yield Violation("disclosures.declared_examples", missing_number_message())


def _too_few(plan: Plan, policy: Policy, examples: int) -> Iterator[Violation]:
    rules = policy.training
    if examples < rules.min_examples:
        yield Violation(
            "training.min_examples", f"the data set has {examples} records, expected at least {rules.min_examples}", examples
        )
    batches = [stage.local.sample_rate(examples) * examples for stage in plan.stages]
    for batch in batches:
        if batch < rules.min_batch:
            problem = f"a batch would have {batch:.0f} records, expected at least {rules.min_batch:g}"
            yield Violation("training.min_batch", problem, math.floor(min(batches)))


def _too_large_delta(privacy: RecordPrivacy, policy: Policy, examples: int) -> Iterator[Violation]:
    wanted = privacy.delta_for(examples)
    allowed = compute_delta(policy.budget.delta_per_run, examples)
    if wanted > allowed:
        problem = f"the plan asks for δ = {wanted:.2g}, expected at most {allowed:.2g}"
        yield Violation("budget.delta_per_run", problem, privacy.delta)
    most = policy.budget.largest_delta(examples)
    if wanted > most:
        problem = f"the plan asks for δ = {wanted:.2g}, expected at most {most:.2g}: the promise may fail for a record in 1/δ"
        yield Violation("budget.delta_times_records", problem, min(1.0, float(f"{wanted * examples:.2g}") * 1.1))


def _over_budget(privacy: RecordPrivacy, policy: Policy) -> Iterator[Violation]:
    rules = policy.budget
    run = rules.epsilon_for(privacy.epsilon)
    if run > rules.epsilon_per_run:
        yield Violation(
            "budget.epsilon_per_run",
            f"the plan would spend ε = {run:g}, expected at most {rules.epsilon_per_run:g}; to join with more noise, set"
            " budget.own_epsilon to what you want to spend",
            run,
        )


def limit_gpu_memory(policy: Policy, device: torch.device) -> None:
    """Limit the GPU memory of this process to what the policy allows; beyond it, torch raises its out-of-memory error."""
    if policy.training.max_gpu_memory_gib is not None and device.type == "cuda":
        limit_memory(device, policy.training.max_gpu_memory_gib)
