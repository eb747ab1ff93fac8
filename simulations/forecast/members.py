"""Whom a forecast is about: the organizations of a simulation, or of a federation of which only numbers of records are known.

What the policy of a new site says to a plan: the rules that decline it, and what a smaller ε of the site's own would bring.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cotune.client.consent.policy_check import find_violations
from cotune.client.noise_calibration import check_examples, get_budget, noise_multiplier, planned_charges
from cotune.client.training.checks.gradient_checks import check_stages
from cotune.data.config import has_labels
from cotune.data.multi_task import qualify
from cotune.errors import PlanError, PrivacyError
from cotune.models.base.folder import read_base_labels
from cotune.models.base.lookup import find_base
from cotune.models.device import pick_device
from cotune.models.features.public_map import pin_model
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import epsilon
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.policy import BudgetRules, Policy
from cotune.server.rounds.feasibility import check_feasible
from cotune.simulations.prepare import Prepared
from cotune.simulations.record_notes import holder_notes

_TWO_CLASSES = ("first class", "second class")  # where nobody has said which there are


@dataclass(frozen=True)
class Member:
    """An organization as its noise follows from what is known of it.

    Attributes:
        examples: Its units of privacy, for the eyes of anyone who asks.
        public: N, the number that its noise and its batches follow from.
        noise_multiplier: σ; None without privacy.
    """

    name: str
    examples: int
    public: int
    policy: Policy
    noise_multiplier: float | None


@dataclass(frozen=True)
class Expected:
    """A plan with nothing left open, its model, and who takes part.

    Attributes:
        test_examples: None where no records are known.
        notes: What anyone who reads the forecast should know about records and classes.
    """

    plan: Plan
    model: TrainableModel
    members: tuple[Member, ...]
    test_examples: int | None
    notes: tuple[str, ...]


def get_members(prepared: Prepared, model: TrainableModel) -> Expected:
    """Return the organizations of a simulation, which allow everything."""
    plan = prepared.plan
    members = tuple(
        Member(share.name, share.units, share.public_examples(plan), share.policy(plan), prepared.noise.get(share.name))
        for share in prepared.shares
    )
    return Expected(plan, model, members, sum(len(rows) for _, rows in prepared.test), tuple(prepared.notes))


def build_members(plan: Plan, examples: Sequence[int], device: str = "auto") -> Expected:
    """Return organizations with given numbers of records, of which none is read.

    Their policies allow the plan, and tell what a new policy tells: the number of records with noise, which is charged, too.

    Args:
        plan: What they carry out.
        examples: The number of records of each organization.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        PlanError, PrivacyError, DataError, ModelError, DeviceError: For a plan that these organizations cannot carry out.
    """
    pick_device(device)
    resolved, notes = open_plan(plan)
    policy = Policy.permissive().model_copy(update={"disclosures": Policy().disclosures})
    names = [f"org-{number}" for number in range(1, len(examples) + 1)]
    for name, count in zip(names, examples, strict=True):
        for stage in resolved.stages:
            check_examples(count, stage.local, name)
    check_feasible(resolved, len(examples), server_data=False)
    noise = {count: _noise(resolved, policy, count) for count in dict.fromkeys(examples)}
    members = tuple(Member(name, count, count, policy, noise[count]) for name, count in zip(names, examples, strict=True))
    model = get_plan_model(resolved, device)
    check_stages(resolved, model)
    return Expected(resolved, model, members, None, (*notes, *_who_holds_what(resolved, names)))


def _who_holds_what(plan: Plan, names: Sequence[str]) -> Iterator[str]:
    """Yield what follows from `simulation.tasks`, where that speaks of these organizations, for the heads of several tasks."""
    held = plan.simulation.tasks
    if plan.tasks and len(held) == len(names):
        pairs = list(zip(names, held, strict=True))
        yield from holder_notes({task.name: [name for name, own in pairs if task.name in own] for task in plan.tasks})
    elif plan.tasks and len(names) > 1:
        yield (
            "which organizations hold which tasks is not known here: a head that one of them alone trains is that organization's"
            " own release, as nothing is averaged into it"
        )


def open_plan(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan with its base model pinned and its classes named, without looking at records; what is assumed in it."""
    base = find_base(plan.model)
    labels = plan.labels or (read_base_labels(base.path) if has_labels(plan.task) and not plan.tasks else ())
    notes = tuple[str, ...]()
    if not labels and has_labels(plan.task):
        labels = _made_up_labels(plan)
        notes = ("the plan lists no labels: sizes are those of two classes; list all classes in labels for the real ones",)
    pinned = pin_model(plan.model, base)
    return plan.model_copy(update={"labels": labels, "model": pinned}), notes


def _made_up_labels(plan: Plan) -> tuple[str, ...]:
    """Two classes; of several tasks, two of each that does not list its own."""
    if not plan.tasks:
        return _TWO_CLASSES
    return tuple(qualify(task.name, label) for task in plan.tasks for label in task.labels or _TWO_CLASSES)


def parse_examples(text: str) -> tuple[int, ...]:
    """Return the numbers of records in a text such as "1000,5000,800". Raises PlanError for anything else."""
    words = [word.strip().replace("_", "") for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= 10**12 for word in words):
        raise PlanError(
            f'--examples {text}: expected the number of records of each organization, such as "1000,5000,800"',
            code="plan.malformed_examples",
        )
    return tuple(int(word) for word in words)


def _noise(plan: Plan, policy: Policy, examples: int) -> float | None:
    if not isinstance(plan.privacy, RecordPrivacy):
        return None
    return noise_multiplier(plan, policy, get_budget(plan.privacy, policy, examples), examples, 1)


_BUDGET = "budget.epsilon_per_run"


@dataclass(frozen=True)
class Refusal:
    """A rule of a new policy that declines the plan.

    Attributes:
        rule: Its name.
        problem: In words.
        organizations: Whose policy; all of them where the plan alone decides.
    """

    rule: str
    problem: str
    organizations: tuple[str, ...]


@dataclass(frozen=True)
class OwnBound:
    """An organization that joins with its own, smaller ε.

    Attributes:
        organization: Its name.
        noise_multiplier: σ.
        epsilon: What its run spends.
    """

    organization: str
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
        for broken in find_violations(plan, Policy(), member.public):
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
        budget = get_budget(privacy, policy, examples)
        sigma = noise_multiplier(plan, policy, budget, examples, 1)
    except PrivacyError:
        return None
    return sigma, epsilon(planned_charges(plan, policy, sigma, examples), budget.delta)
