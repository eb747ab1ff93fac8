"""Whether a charge may be made: what it would bring every record to that it concerns, against what was allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cotune.models.errors import Declined
from cotune.privacy.accounting import Steps, epsilon
from cotune.privacy.chain import Entry
from cotune.privacy.charges import History, histories_of
from cotune.privacy.filters import check_accountants, epsilon_over_runs
from cotune.privacy.rounding import round_up


@dataclass(frozen=True)
class Limit:
    """Composing a new charge with those before must stay within ε at δ.

    plan_id: only charges of that plan, composed by PLD; None: those of all runs, composed by `epsilon_over_runs`.
    """

    rule: str
    epsilon: float
    delta: float
    plan_id: str | None = None

    def reached(self, runs: Mapping[str, Sequence[Steps]], delta: float) -> float:
        """ε of the runs as far as they count for this limit."""
        if self.plan_id is None:
            return epsilon_over_runs(runs, self.epsilon, delta)
        return epsilon(runs.get(self.plan_id, ()), delta)


def check_charge(entries: Sequence[Entry], collection: str, plan_id: str, steps: Steps, limits: Sequence[Limit]) -> None:
    """Raises Declined when a limit would be exceeded for a collection that the charge concerns.

    Each is looked at with all charges that may have touched one of its records, and at the smallest δ that was ever promised
    there: what is decided here follows from the charges and from no record. Raises PrivacyError when two accountants contradict
    each other about the run.
    """
    for limit in limits:
        for history in histories_of(entries, collection, limit.rule, limit.plan_id):
            _check_limit(limit, history, plan_id, steps)
    if limits:
        delta = min(limit.delta for limit in limits)
        for history in histories_of(entries, collection):
            check_accountants(history.with_steps(plan_id, [steps])[plan_id], delta)


def _check_limit(limit: Limit, history: History, plan_id: str, steps: Steps) -> None:
    delta = min(limit.delta, history.delta)
    after = limit.reached(history.with_steps(plan_id, [steps]), delta)
    if after > limit.epsilon:
        left = max(0.0, limit.epsilon - limit.reached(history.runs, delta))
        which = f"the collection {history.collection}" if history.collection else "this organization"
        raise Declined(
            limit.rule,
            f"{steps.count} steps would bring {which} to ε = {round_up(after)} at δ = {delta:.2g}, expected at most"
            f" {limit.epsilon:g}, of which {left:.2f} are left: raise {limit.rule} in policy.toml, or stay out",
        )
