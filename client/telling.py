"""What an organisation tells the server beside its update, as far as plan and policy agree.

What is noised is a Gaussian mechanism on sums, which one record changes by a known amount at most: charged to the ledger before
it is computed. What is told once per run is drawn once and remembered, so that asking again reveals nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cotune.client.account import Account
from cotune.models.errors import RunError
from cotune.privacy.accounting import Steps
from cotune.privacy.randomness import private_generator

__all__ = ["Teller"]


class Teller:
    """Tells for one account. generator: only tests give one."""

    def __init__(self, account: Account, generator: np.random.Generator | None = None) -> None:
        self.account, self.plan, self.policy = account, account.plan, account.policy
        self.generator = generator or private_generator()

    def examples(self, count: int, round: int) -> int:
        """The number of records to declare, at least 1."""
        told = self.policy.tell
        if told.example_count == "exact":
            return count
        if told.example_count == "declared":
            return told.declared_examples
        if told.example_count == "rounded":
            step: int = 10 ** (len(str(count)) - 1)
            return max(1, math.floor(count / step + 0.5) * step)
        return max(1, math.floor(self._once("example count", [count], round)[0] + 0.5))

    def histogram(self, counts: Sequence[float], round: int) -> dict[str, float]:
        """Label -> how many records have it, with noise: once per run; empty unless plan and policy want it."""
        if not (self.plan.tell.label_histogram and self.policy.tell.label_histogram == "noised"):
            return {}
        noised = self._once("label histogram", counts, round)
        return {f"label {label}": value for label, value in zip(self.plan.labels, noised, strict=True)}

    def metrics(self, correct: Callable[[], tuple[float, int]], round: int) -> dict[str, float]:
        """Records that the received model classifies rightly, of how many; empty unless plan and policy want it.

        correct: computes both. One record changes both by one at most: the sensitivity of the pair is √2.
        """
        if not self.plan.tell.local_metrics or self.policy.tell.local_metrics == "none":
            return {}
        if self.policy.tell.local_metrics == "clear":
            self.account.leave_unprotected(round, "local metrics")
            right, records = map(float, correct())
        else:
            charge = self.account.reserve(round, self._one(), "local metrics")
            right, records = (self._noised(value, math.sqrt(2)) for value in correct())
            self.account.ledger.settle(charge, 1)
        return {"correct": right, "records": records}

    def loss(self, total: Callable[[float], float], count: int, round: int) -> dict[str, float]:
        """The received model's mean loss in nats; empty unless the plan's strategy asks for it.

        total: c -> Σ min(ℓ_i, c) over the own records, of which there are `count`. With noise, c is the policy's ceiling, which
        is then the sensitivity of the sum, and the divisor is the declared number. Without privacy the delta says more than the
        loss, and no noise is added. Raises RunError for a loss that is not finite.
        """
        if "loss" not in self.plan.strategy.sends:
            return {}
        if self.policy.tell.local_loss == "noised" and self.account.budget is not None:
            ceiling, declared = self.policy.tell.loss_ceiling, self.examples(count, round)
            charge = self.account.reserve(round, self._one(), "local loss")
            noised = self._noised(total(ceiling), ceiling)
            self.account.ledger.settle(charge, 1)
            return {"loss": min(max(noised / declared, 0.0), ceiling)}
        self.account.leave_unprotected(round, "local loss")
        mean = total(math.inf) / count
        if not math.isfinite(mean):
            raise RunError(f"the received model's loss is {mean}: expected a finite one, as the plan weighs updates by it")
        return {"loss": mean}

    def _once(self, what: str, values: Sequence[float], round: int) -> list[float]:
        """Noised values that are drawn once per run: durable before they are told."""
        ledger, data = self.account.ledger, self.account.data
        known = ledger.told(self.plan.plan_id, data, what)
        if known is None:
            charge = self.account.reserve(round, self._one(), what)
            known = [self._noised(value, 1.0) for value in values]
            ledger.tell(self.plan.plan_id, data, what, known)
            ledger.settle(charge, 1)
        return known

    def _one(self) -> Steps:
        return Steps(self.policy.tell.noise_multiplier, 1.0, 1)

    def _noised(self, value: float, sensitivity: float) -> float:
        return value + self.policy.tell.noise_multiplier * sensitivity * float(self.generator.standard_normal())
