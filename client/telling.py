"""What an organisation tells the server beside its update, as far as plan and policy agree.

What is noised is a Gaussian mechanism on sums, which one record changes by a known amount at most: charged to the ledger before
it is computed. What is told once per run is drawn once and remembered, so that asking again reveals nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cotune.client.account import Account
from cotune.models.errors import RunError
from cotune.privacy.accounting import Steps


class Teller:
    """Tells for one account."""

    def __init__(self, account: Account) -> None:
        self.account, self.plan, self.policy = account, account.plan, account.policy

    def histogram(self, counts: Sequence[float]) -> dict[str, float]:
        """Label -> how many records have it, with noise: once per run; empty unless plan and policy want it."""
        if not (self.plan.tell.label_histogram and self.policy.tell.label_histogram == "noised"):
            return {}
        noised = self.account.once("label histogram", counts)
        return {f"label {label}": value for label, value in zip(self.plan.labels, noised, strict=True)}

    def metrics(self, correct: Callable[[], tuple[float, int]], round: int) -> dict[str, float]:
        """Records that the received model classifies rightly, of how many; empty unless plan and policy want it.

        correct: computes both. One unit changes both by one at most: the sensitivity of the pair is √2.
        """
        if not self.plan.tell.local_metrics or self.policy.tell.local_metrics == "none":
            return {}
        if self.policy.tell.local_metrics == "clear":
            self.account.leave_unprotected(round, "local metrics")
            right, records = map(float, correct())
        else:
            charge = self.account.reserve(round, self._one(), "local metrics")
            right, records = self.account.noised(correct(), math.sqrt(2))
            self.account.ledger.settle(charge, 1)
        return {"correct": right, "records": records}

    def loss(self, total: Callable[[float], float], count: int, round: int) -> dict[str, float]:
        """The received model's mean loss in nats; empty unless the plan's strategy asks for it.

        total: c -> Σ min(ℓ_i, c) over the own records, of which there are `count`. With noise, c is the policy's ceiling, which
        is then the sensitivity of the sum, and the divisor is the public number of records. Without
        privacy the delta says more than the loss, and no noise is added. Raises RunError for a loss that is not finite.
        """
        if "loss" not in self.plan.strategy.sends:
            return {}
        if self.policy.tell.local_loss == "noised" and self.account.budget is not None:
            ceiling, declared = self.policy.tell.loss_ceiling, self.account.public_examples
            charge = self.account.reserve(round, self._one(), "local loss")
            [noised] = self.account.noised([total(ceiling)], ceiling)
            self.account.ledger.settle(charge, 1)
            return {"loss": min(max(noised / declared, 0.0), ceiling)}
        self.account.leave_unprotected(round, "local loss")
        mean = total(math.inf) / count
        if not math.isfinite(mean):
            raise RunError(f"the received model's loss is {mean}: expected a finite one, as the plan weighs updates by it")
        return {"loss": mean}

    def _one(self) -> Steps:
        return Steps(self.policy.tell.noise_multiplier, 1.0, 1)
