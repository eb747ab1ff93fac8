"""Choose the noise such that all rounds of a plan stay within an organization's budget, and all plans within its total."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cotune.errors import DataError, PolicyError, PrivacyError
from cotune.plan.local_training import LocalTraining
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, add_counts, calibrate, epsilon
from cotune.privacy.accounting.display_rounding import round_up
from cotune.privacy.accounting.filters import epsilon_filter, epsilon_of_total
from cotune.privacy.config import RecordPrivacy, compute_delta
from cotune.privacy.ledger.charges import History, Limit
from cotune.privacy.policy import Policy

_TOLERANCE = 1e-3  # relative, of a noise multiplier


@dataclass(frozen=True)
class Total:
    """The limit of a run together with all other runs on the same collections.

    Attributes:
        plan_id: Of the run.
        epsilon: Limit of the total ε, at `delta`.
        delta: δ of the total.
        histories: Charges so far of each collection that the run's charges concern; empty: nothing was charged yet.
    """

    plan_id: str
    epsilon: float
    delta: float
    histories: Sequence[History] = field(default=())

    @property
    def others(self) -> bool:
        """Whether another run was charged in these collections."""
        return any(name != self.plan_id for history in self.histories for name in history.runs)

    def after(self, steps: Sequence[Steps]) -> float:
        """Return the largest total ε of these collections after further steps of the run."""
        return max(
            history.compute_epsilon(self.epsilon, min(self.delta, history.delta), self.plan_id, steps)
            for history in self.histories or [History("", {})]
        )

    def is_within(self, planned: Sequence[Steps], spent: Sequence[Steps], to_come: Sequence[Steps]) -> bool:
        """Return whether the run has kept to its plan so far, and the plan as a whole fits into the total.

        If so, ε need not be composed again in each round: a part of the planned steps has no larger ε than all of them, for which
        σ was calibrated.

        Args:
            planned: All steps of the run, whose ε is within its budget.
            spent: Steps that were charged.
            to_come: Steps from this round on.
        """
        if self.others or not _is_part([*spent, *to_come], planned):
            return False
        for history in self.histories or [History("", {})]:
            if not _is_part([*history.all_steps(), *to_come], planned):
                return False
            if epsilon_of_total(1, planned, self.epsilon, min(self.delta, history.delta)) > self.epsilon:
                return False
        return True

    def spent(self) -> float:
        """Return the total ε so far as it counts for this run; by the filter if there was another run before."""
        return max((self._spent(history) for history in self.histories), default=0.0)

    def _spent(self, history: History) -> float:
        delta = min(self.delta, history.delta)
        if all(name == self.plan_id for name in history.runs):
            return history.compute_epsilon(self.epsilon, delta)
        return epsilon_filter(history.all_steps(), self.epsilon, delta / 2)

    def smallest_noise(self, steps_at: Callable[[float], Sequence[Steps]], low: float, high: float) -> float:
        """Return the smallest σ in [low, high] with which the steps fit into the total.

        Args:
            steps_at: σ -> the steps.
            low: Lower end of the search.
            high: Upper end of the search.

        Returns:
            σ with a relative error of 1e-3; infinity if none fits.
        """
        if self.after(steps_at(high)) > self.epsilon:
            return math.inf
        while high / low > 1 + _TOLERANCE:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.after(steps_at(middle)) <= self.epsilon else (middle, high)
        return high


def _is_part(some: Sequence[Steps], of: Sequence[Steps]) -> bool:
    """Return whether there are no more steps of each kind among the first than among the second."""
    most = {replace(steps, count=1): steps.count for steps in add_counts(of)}
    return all(steps.count <= most.get(replace(steps, count=1), 0) for steps in add_counts(some))


_MAX_NOISE_RATIO = 4.0  # times the calibrated σ; an update with more is nearly pure noise, and would only harm the model


@dataclass(frozen=True)
class Budget:
    """What an organization allows to be spent: ε at δ for one run, and in total over all runs."""

    epsilon: float
    delta: float
    total_epsilon: float
    total_delta: float

    def limits(self, plan_id: str) -> list[Limit]:
        """Return the limits against which the ledger checks a charge."""
        return [
            Limit("budget.epsilon_per_run", self.epsilon, self.delta, plan_id),
            Limit("budget.epsilon_total", self.total_epsilon, self.total_delta),
        ]


def get_budget(privacy: RecordPrivacy, policy: Policy, examples: int) -> Budget:
    """Return the budget of a run: the plan's ε or the policy's, whichever is smaller.

    Args:
        privacy: Of the plan.
        policy: Of the organization.
        examples: The public number of records, on which δ depends.

    Raises:
        PrivacyError: If δ of the total is so large that it promises nothing.
    """
    rules = policy.budget
    return Budget(
        rules.epsilon_for(privacy.epsilon), privacy.delta_for(examples), rules.epsilon_total, total_delta(policy, examples)
    )


def total_delta(policy: Policy, examples: int) -> float:
    """Return δ of the policy's total; raises PrivacyError if it is so large that its ε would limit nothing."""
    delta = compute_delta(policy.budget.delta_total, examples)
    most = policy.budget.largest_delta(examples)
    if delta > most:
        raise PrivacyError(
            f"budget.delta_total = {policy.budget.delta_total} gives δ = {delta:.2g} for {examples} examples; expected at most"
            f' {most:.2g}: choose a smaller δ in policy.toml, such as "1/n^1.5"',
            code="privacy.delta_too_large",
        )
    return delta


def check_examples(examples: int, local: LocalTraining, organization: str) -> None:
    """Check that the records fill a batch.

    Args:
        examples: Number of records.
        local: Training of the plan.
        organization: For the error.

    Raises:
        DataError: If there are too few.
    """
    needed = local.fewest_records()
    if examples < needed:
        raise DataError(
            f"{organization} has {examples} examples, fewer than a batch needs ({needed:g} with local.batch_size ="
            f" {local.batch_size}): use fewer organizations, or another batch size",
            code="data.too_few_records",
        )


def planned_steps(plan: Plan, examples: int, first_round: int = 1) -> list[tuple[float, int]]:
    """Return the charged steps of the stages of a plan.

    Args:
        plan: The plan.
        examples: The public number of records.
        first_round: The round from which on steps count.

    Returns:
        (sample rate, number of steps) of each stage.
    """
    planned = []
    last = 0
    for stage in plan.stages:
        rounds = min(stage.rounds, last + stage.rounds - first_round + 1)
        last += stage.rounds
        if rounds > 0:
            planned.append((plan.charged_rate(stage, examples), rounds * plan.charged_steps(stage, examples)))
    return planned


def planned_disclosures(plan: Plan, policy: Policy, first_round: int = 1, *, counted: bool = False) -> list[Steps]:
    """Return the charges of noised disclosures from a round on.

    Each disclosure is a Gaussian mechanism on one or two sums, charged like training; the number of records is disclosed by a
    geometric mechanism.

    Args:
        plan: The plan.
        policy: Of the organization.
        first_round: The round from which on disclosures count.
        counted: Whether the number of records was disclosed already.
    """
    rounds = plan.rounds - first_round + 1
    number = (
        policy.disclosures.example_count == "noised" and not counted
    )  # drawn before the first round in which the organization takes part
    histogram = first_round == 1 and plan.disclosures.label_histogram and policy.disclosures.label_histogram == "noised"
    metrics = plan.disclosures.local_metrics and policy.disclosures.local_metrics == "noised"
    loss = "loss" in plan.strategy.sends and policy.disclosures.local_loss == "noised"
    sigma = policy.disclosures.noise_multiplier
    counts = [Steps(sigma, 1.0, 1, "geometric")] if number else []
    count = histogram + rounds * (metrics + loss)
    return [*counts, Steps(sigma, 1.0, count)] if count else counts


def planned_charges(plan: Plan, policy: Policy, sigma: float, examples: int) -> list[Steps]:
    """Return all charges of a run: noised disclosures, and every step of training.

    Args:
        plan: The plan.
        policy: Of the organization.
        sigma: σ of the steps of training.
        examples: The public number of records.
    """
    return [*planned_disclosures(plan, policy), *(Steps(sigma, rate, count) for rate, count in planned_steps(plan, examples))]


def noise_multiplier(
    plan: Plan,
    policy: Policy,
    budget: Budget,
    examples: int,
    round: int,
    *,
    spent: Sequence[Steps] = (),
    histories: Sequence[History] = (),
    counted: bool = False,
) -> float:
    """Return σ for the rounds from `round` on: calibrated once for all steps of all rounds, and kept as long as it suffices.

    More than planned may have been spent, as the steps of a round that crashed are charged, too. Then the rest of the budget is
    distributed over the remaining steps.

    Args:
        plan: The plan.
        policy: Of the organization.
        budget: Of the run.
        examples: The public number of records.
        round: The next round.
        spent: Charges of this run.
        histories: Of each collection that its charges concern, including this run's.
        counted: Whether `spent` includes the draw of the number of records.

    Raises:
        PolicyError: If the run does not fit into what is left of the total.
        PrivacyError: If the rest of the run's budget is so small that the update would be almost pure noise.
    """
    sigma = calibrate(
        planned_steps(plan, examples), epsilon=budget.epsilon, delta=budget.delta, spent=planned_disclosures(plan, policy)
    )
    remaining = planned_steps(plan, examples, round)
    telling = planned_disclosures(plan, policy, round, counted=counted)
    total = Total(plan.plan_id, budget.total_epsilon, budget.total_delta, histories)

    def to_come(noise: float) -> list[Steps]:
        return [*telling, *(Steps(noise, q, count) for q, count in remaining)]

    if total.is_within(planned_charges(plan, policy, sigma, examples), spent, to_come(sigma)):
        return sigma
    needed = sigma
    if epsilon([*spent, *to_come(sigma)], budget.delta) > budget.epsilon:
        needed = calibrate(remaining, epsilon=budget.epsilon, delta=budget.delta, spent=[*spent, *telling])
    if total.after(to_come(needed)) > total.epsilon:
        if len(spent) <= counted and (total.others or budget.epsilon > total.epsilon):
            raise _too_much_in_total(plan, budget, examples, sigma, total, telling)
        needed = total.smallest_noise(to_come, needed, 1.01 * max(needed, _MAX_NOISE_RATIO * sigma))
    if needed > _MAX_NOISE_RATIO * sigma:
        raise PrivacyError(
            f"this plan has spent ε = {round_up(epsilon(list(spent), budget.delta))} of {budget.epsilon:g} here already, in an"
            f" earlier run of it or in rounds that were interrupted: the {plan.rounds - round + 1} rounds to come would need more"
            f" than {_MAX_NOISE_RATIO:g} times the planned noise; for another run agree on another seed, else leave the rest to"
            " the others",
            code="privacy.budget_spent",
        )
    return needed


def _too_much_in_total(
    plan: Plan, budget: Budget, examples: int, sigma: float, total: Total, telling: Sequence[Steps]
) -> PolicyError:
    """Return the refusal of a run that does not fit: what it needs, what is left, and how many rounds would fit."""
    spent = total.spent()
    return PolicyError(
        "budget.epsilon_total",
        f"the plan asks for ε = {budget.epsilon:g} in {plan.rounds} rounds, and {max(total.epsilon - spent, 0.0):.2f} of the"
        f" total {total.epsilon:g} are left (spent over all runs: {round_up(spent)}, at δ ="
        f" {total.delta:.2g}): with this plan's noise at most {_fitting(plan, examples, sigma, total, telling)} of its rounds"
        " would fit; set budget.own_epsilon to spend less, or raise budget.epsilon_total in policy.toml",
    )


def _fitting(plan: Plan, examples: int, sigma: float, total: Total, telling: Sequence[Steps]) -> int:
    """Return how many of the plan's first rounds fit into the total at σ; by bisection, as ε grows with the rounds."""
    every = [
        (plan.charged_rate(stage, examples), plan.charged_steps(stage, examples))
        for stage in plan.stages
        for _ in range(stage.rounds)
    ]
    low = 0
    high = plan.rounds
    while low < high:
        middle = (low + high + 1) // 2
        steps = [*telling, *(Steps(sigma, q, count) for q, count in every[:middle])]
        low, high = (middle, high) if total.after(steps) <= total.epsilon else (low, middle - 1)
    return low
