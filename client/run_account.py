"""A run's account at an organization: charges for one plan and one data set, and the public number of records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from cotune.client.consent.policy_check import missing_number_message
from cotune.client.noise_calibration import Budget, Total, get_budget, noise_multiplier, total_delta
from cotune.client.site import Site
from cotune.data.dataset import Dataset
from cotune.data.units import RECORD
from cotune.errors import PolicyError, PrivacyError
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.display_rounding import round_to_two_digits
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.ledger.charges import Limit
from cotune.privacy.ledger.ledger import Ledger, Settlement
from cotune.privacy.mechanisms.geometric import add_geometric_noise
from cotune.privacy.mechanisms.grid_noise import add_gaussian_noise
from cotune.privacy.mechanisms.random_generators import private_generator
from cotune.privacy.policy import Policy

_COUNT = "example count"
_DELTA = 1e-10  # δ at which the draw of N is checked against the total: below that of any data set, whose δ follows from N


class Account:
    """What a run has spent and may spend.

    Args:
        plan: The plan.
        policy: Of the organization.
        site: Of the organization.
        dataset: The records that count under the plan's promise.
        round: The round that charges are entered for.
        draws: Whether anything may be charged. If not, the result is only for the organization itself: a number of records that
            is yet to be noised or declared is then estimated from the true one.
        generator: Of the noise; only tests pass one.
    """

    def __init__(
        self,
        plan: Plan,
        policy: Policy,
        site: Site,
        dataset: Dataset,
        *,
        round: int = 1,
        draws: bool = True,
        generator: np.random.Generator | None = None,
    ) -> None:
        self.plan = plan
        self.policy = policy
        self.site = site
        self.dataset = dataset
        self.round = round
        self.draws = draws
        self._generator = generator
        self._settled: Settlement | None = None  # of the round's charge, until the answer is entered

    @property
    def true_examples(self) -> int:
        """Return n, the number of privacy units. Nothing that others can see depends on it; see `public_examples`."""
        return len(self.dataset.units)

    @cached_property
    def public_examples(self) -> int:
        """Return N ≥ 1, the public number of records, which determines sample rate, batch, noise, steps and δ.

        A noised one is charged, then drawn, then stored for the rest of the plan.

        Raises:
            PolicyError: If the policy wants to declare a number but does not give it, or too little budget is left to draw one.
        """
        rules = self.policy.disclosures
        count = self.true_examples
        if rules.example_count == "exact":
            return max(1, count)
        if rules.example_count == "rounded":
            step: int = 10 ** (len(str(count)) - 1)
            return max(1, math.floor(count / step + 0.5) * step)
        if rules.example_count == "declared":
            return rules.declared_examples or self._undeclared()
        return max(1, math.floor(self._noised_count() + 0.5))

    def _noised_count(self) -> float:
        known = self._disclosed(_COUNT) if self.draws or self.site.has_ledger else None
        if known is None and not self.draws:
            return self.true_examples
        return (known or self._draw_count())[0]

    def _draw_count(self) -> list[float]:
        """Charge and draw N. As δ follows from N, the charge is checked against the total at a fixed, public δ.

        Everything else depends on N, so the draw has its own ε (see `privacy.mechanisms.geometric`).
        """
        total = self.policy.budget.epsilon_total
        sigma = self.policy.disclosures.noise_multiplier
        try:
            return self._drawn(
                _COUNT,
                Steps(sigma, 1.0, 1, "geometric"),
                [Limit("disclosures.example_count", total, _DELTA)],
                lambda: [add_geometric_noise(self.true_examples, sigma, self.generator)],
            )
        except PolicyError:
            raise PolicyError(
                "budget.epsilon_total",
                f"too little of the total {total:g} is left to disclose the number of records with noise, from which a run's"
                " noise follows: raise budget.epsilon_total in policy.toml, or declare a number",
            ) from None

    def _undeclared(self) -> int:
        if self.draws:
            raise PolicyError("disclosures.declared_examples", missing_number_message())
        return max(1, round_to_two_digits(self.true_examples))

    @cached_property
    def budget(self) -> Budget | None:
        """The run's budget; None without record-level privacy, as training is then not charged.

        Raises:
            PrivacyError: If δ is so large that it promises nothing.
        """
        privacy = self.plan.privacy
        return get_budget(privacy, self.policy, self.public_examples) if isinstance(privacy, RecordPrivacy) else None

    @cached_property
    def generator(self) -> np.random.Generator:
        """The source of noise."""
        return self._generator or private_generator()

    @cached_property
    def ledger(self) -> Ledger:
        """The site's ledger, which is created if it is missing."""
        return self.site.ledger()

    @cached_property
    def data(self) -> str:
        """The fingerprint of the data set, which is entered in the ledger on first access."""
        held = self.dataset
        return self.ledger.register_data_set(held.get_unit_identities(), unit=held.unit or RECORD, also=held.linked_identities())

    @property
    def collection(self) -> str:
        """The collection that the run is charged to, according to the site's data.json; "": all."""
        return self.dataset.collection

    def hours(self) -> float:
        """Return the hours of training that this run has taken, over finished and charged rounds."""
        if not self.site.has_ledger:
            return 0.0
        return self.ledger.seconds(self.plan.plan_id) / 3600

    def check_unanswered(self, round: int) -> None:
        """Check that a round may be trained: each round is answered once, and none after a later one.

        ε of a run is composed under the assumption that all its parameters are fixed before the first answer (see
        `privacy.accounting.filters`). A server that could repeat a round on another state, or go back, would choose queries
        adaptively.

        Raises:
            PrivacyError: If the round, or a later one, was answered (`privacy.answered_round`).
        """
        last = self.ledger.last_answered_round(self.plan.plan_id)
        kept = self.site.last_finished_round(self.plan.plan_id) or 0
        if kept > last:  # a process was killed right after it had kept the update
            self.answered(kept)
            last = kept
        if round <= last:
            raise PrivacyError(
                f"round {round} of {self.plan.name} is asked for after round {last} was answered, in another request: expected a"
                " later round, as each is answered once; let the server go on where it was, or begin a run of another plan (a"
                " new seed makes one)",
                code="privacy.answered_round",
            )

    def answered(self, round: int) -> None:
        """Record in the ledger that a round's update is complete and may leave."""
        self.ledger.record_answer(self.plan.plan_id, round, data=self.data, settled=self._settled)
        self._settled = None

    def plan_noise(self, round: int) -> float:
        """Return σ for a round and those after it (see `budget.noise_multiplier`), without charging training.

        Raises:
            PolicyError, PrivacyError: If the budget does not suffice.
        """
        assert self.budget is not None, "without privacy there is no noise"
        self.ledger.check_unit(self.data)
        return noise_multiplier(
            self.plan,
            self.policy,
            self.budget,
            self.public_examples,
            round,
            spent=self.ledger.spent(self.plan.plan_id, self.collection),
            histories=self.ledger.histories(self.collection, "budget.epsilon_total"),
            counted=self.policy.disclosures.example_count == "noised" and self._disclosed(_COUNT) is not None,
        )

    def spent_in_total(self) -> float:
        """Return ε of all runs that count together with this one, as it counts against the total if this run starts."""
        assert self.budget is not None, "without privacy nothing is spent"
        histories = self.ledger.histories(self.collection, "budget.epsilon_total")
        return Total(self.plan.plan_id, self.budget.total_epsilon, self.budget.total_delta, histories).spent()

    def reserve(self, round: int, steps: Steps, purpose: str = "training") -> int:
        """Charge steps durably, before they run.

        Args:
            round: The round of the charge.
            steps: To be charged.
            purpose: Of the charge, for the ledger.

        Returns:
            The number of the charge, with which it is settled.

        Raises:
            PolicyError: If they would exceed what the policy allows; nothing is charged then.
        """
        return self._reserve(round, steps, purpose, self._limits())

    def settle(self, charge: int, reserved: Steps, ran: int, seconds: float = 0.0) -> None:
        """Settle the charge of the round: where all reserved steps ran, together with the answer (see `answered`).

        Until then the reservation counts as many. Fewer steps are settled at once, as the ε that is told counts what ran.

        Args:
            charge: Its number.
            reserved: What was reserved.
            ran: How many steps ran.
            seconds: Duration of the training.
        """
        if ran == reserved.count:
            self._settled = Settlement(charge, ran, seconds)
        else:
            self.ledger.settle(charge, ran, seconds)

    def settle_unanswered(self) -> None:
        """Settle the charge of a round that was trained and then failed, so that its hours count; else do nothing."""
        if self._settled is not None:
            self.ledger.settle(self._settled.charge, self._settled.steps, self._settled.seconds)
            self._settled = None

    def once(self, what: str, compute: Callable[[], Sequence[float]]) -> list[float]:
        """Return noised sums, drawn once per run: they are charged, then computed and noised, then stored, and only then
        returned.

        Args:
            what: Name of the sums, such as "label histogram".
            compute: Computes them; one privacy unit must change them by at most 1 in L2 norm.
        """
        known = self._disclosed(what)
        if known is not None:
            return known
        steps = Steps(self.policy.disclosures.noise_multiplier, 1.0, 1)
        return self._drawn(what, steps, self._limits(), lambda: self.noised(compute(), 1.0))

    def _drawn(self, what: str, steps: Steps, limits: Sequence[Limit], draw: Callable[[], list[float]]) -> list[float]:
        charge = self._reserve(self.round, steps, what, limits)
        drawn = draw()
        self.ledger.record_disclosure(self.plan.plan_id, self.data, what, drawn)
        self.ledger.settle(charge, 1)
        return drawn

    def noised(self, values: Sequence[float], sensitivity: float) -> list[float]:
        """Return sums with Gaussian noise, both on a grid, so that low bits do not reveal a sum (see `mechanisms.grid_noise`).

        Args:
            values: The sums.
            sensitivity: The most by which one privacy unit changes them, in L2 norm. Rounding to the grid may add one step for
                each entry, at most 2⁻¹⁸ of the sensitivity, for which the noise is increased.
        """
        enlarged = sensitivity * (1 + 2.0**-17 * math.sqrt(len(values)))
        total = torch.tensor(list(values), dtype=torch.float64)
        return list(add_gaussian_noise(total, enlarged, self.policy.disclosures.noise_multiplier, self.generator).tolist())

    def record_unprotected(self, round: int, what: str) -> None:
        """Record what is about to leave without any privacy; from then on, no ε holds for the data set."""
        plan = self.plan
        self.ledger.record_unprotected(plan.plan_id, round, what, data=self.data, collection=self.collection, plan=plan.name)

    def epsilon(self) -> float:
        """Return ε of this run's charges at the run's δ."""
        assert self.budget is not None, "without privacy nothing is spent"
        return epsilon(self.ledger.spent(self.plan.plan_id, self.collection), self.budget.delta)

    def reported_epsilon(self) -> float:
        """Return ε for the server, rounded up to two decimals.

        It follows from N and from charges whose σ every update reveals anyway. A repeated answer reports the same ε, without what
        attempts at later rounds were charged since.
        """
        assert self.budget is not None, "without privacy nothing is spent"
        charged = self.ledger.spent(self.plan.plan_id, self.collection, answered=self.round)
        return math.ceil(epsilon(charged, self.budget.delta) * 100 - 1e-9) / 100

    def _disclosed(self, what: str) -> list[float] | None:
        return self.ledger.get_disclosure(self.plan.plan_id, what)

    def _reserve(self, round: int, steps: Steps, purpose: str, limits: Sequence[Limit]) -> int:
        plan = self.plan
        where = {"data": self.data, "collection": self.collection}
        return self.ledger.reserve(plan.plan_id, round, steps, **where, plan=plan.name, purpose=purpose, limits=limits)

    def _limits(self) -> list[Limit]:
        if self.budget:
            return self.budget.limits(self.plan.plan_id)
        rules = self.policy.budget
        return [Limit("budget.epsilon_total", rules.epsilon_total, total_delta(self.policy, self.public_examples))]
