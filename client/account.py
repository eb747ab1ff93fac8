"""One run's account at an organisation: its ledger, seen for one plan and one data set."""

from __future__ import annotations

import math
from functools import cached_property

from cotune.client.budget import Budget, budget_of, noise_multiplier, total_delta
from cotune.client.site import Site
from cotune.client.total import Total
from cotune.models.holdings import Holdings
from cotune.models.units import RECORD
from cotune.plan.schema import Plan
from cotune.privacy.accounting import RecordPrivacy, Steps, epsilon
from cotune.privacy.ledger import Ledger, Limit
from cotune.privacy.policy import Policy

__all__ = ["Account"]


class Account:
    """What a run has spent and may spend. budget: None without record-level privacy, where training is not charged."""

    def __init__(self, plan: Plan, policy: Policy, site: Site, holdings: Holdings) -> None:
        self.plan, self.policy, self.site, self.holdings = plan, policy, site, holdings
        self.budget: Budget | None = None
        if isinstance(plan.privacy, RecordPrivacy):
            self.budget = budget_of(plan.privacy, policy, len(holdings.units))

    @cached_property
    def ledger(self) -> Ledger:
        return self.site.ledger()

    @cached_property
    def data(self) -> str:
        """The fingerprint of the data set; the ledger knows it from now on."""
        held = self.holdings
        return self.ledger.know(held.unit_identities(), unit=held.unit or RECORD, also=held.further_identities())

    def hours(self) -> float:
        """Of training that this run has taken, as far as its rounds were finished and charged."""
        if not self.site.ledger_file.exists():
            return 0.0
        return sum(c.seconds for c in self.ledger.charges() if c.plan_id == self.plan.plan_id) / 3600

    def plan_noise(self, round: int) -> float:
        """σ for a round and those after it (see `noise_multiplier`). Raises Declined or PrivacyError; charges nothing."""
        assert self.budget is not None, "without privacy there is no noise"
        self.ledger.check_unit(self.data)
        spent = self.ledger.spent(self.plan.plan_id, self.data)
        histories = self.ledger.histories(self.data, "budget.epsilon_total")
        return noise_multiplier(
            self.plan, self.policy, self.budget, len(self.holdings.units), round, spent=spent, histories=histories
        )

    def spent_in_total(self) -> float:
        """ε of all runs on these records, as it counts against the total if this run begins."""
        assert self.budget is not None, "without privacy nothing is spent"
        histories = self.ledger.histories(self.data, "budget.epsilon_total")
        return Total(self.plan.plan_id, self.budget.total_epsilon, self.budget.total_delta, histories).spent()

    def reserve(self, round: int, steps: Steps, purpose: str = "training") -> int:
        """Charges steps before they run, durably. Raises Declined when they would exceed what the policy allows."""
        plan, total = self.plan, self.policy.budget.epsilon_total
        limits = (
            self.budget.limits(plan.plan_id)
            if self.budget
            else [Limit("budget.epsilon_total", total, total_delta(self.policy, len(self.holdings.units)))]
        )
        return self.ledger.reserve(plan.plan_id, round, steps, data=self.data, plan=plan.name, purpose=purpose, limits=limits)

    def leave_unprotected(self, round: int, what: str) -> None:
        """Enters what is about to leave without any privacy: from then on no ε bounds what is known of the data set."""
        self.ledger.unprotected(self.plan.plan_id, round, what, data=self.data, plan=self.plan.name)

    def epsilon(self) -> float:
        """ε of this run's charges at the run's δ."""
        assert self.budget is not None, "without privacy nothing is spent"
        return epsilon(self.ledger.spent(self.plan.plan_id, self.data), self.budget.delta)

    def stated_epsilon(self) -> float:
        """For the server: rounded up to two digits. Where the number of records is not told, the whole budget of the run."""
        assert self.budget is not None, "without privacy nothing is spent"
        told = self.epsilon() if self.policy.tell.example_count == "exact" else self.budget.epsilon
        return math.ceil(told * 100 - 1e-9) / 100
