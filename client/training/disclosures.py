"""What an organization discloses to the server beside its delta, as far as plan and policy agree.

- Label histogram, metrics and loss: with noise, a Gaussian mechanism on sums that one record changes by a known amount at most,
  charged to the ledger before they are computed. What is disclosed once per run is drawn once and kept, so that asking again
  reveals nothing new.
- The variance of the privacy noise in its delta, which follows from public numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cotune.client.run_account import Account
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.errors import RunError
from cotune.plan.local_training import LocalTraining, Stage
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.delta_noise_variance import LocalOptimizer, delta_noise_variance
from cotune.privacy.mechanisms.per_example import Batch


class Disclosures:
    """Computes what an organization discloses about its records and the received model, and charges it to one account."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.plan = account.plan
        self.policy = account.policy

    def histogram(self, counts: Callable[[], Sequence[float]]) -> dict[str, float]:
        """Return label -> how many records have it, with noise: once per run; empty unless plan and policy want it.

        Args:
            counts: Counts them, by label in the plan's order, once that is charged.
        """
        if not (self.plan.disclosures.label_histogram and self.policy.disclosures.label_histogram == "noised"):
            return {}
        noised = self.account.once("label histogram", counts)
        return {f"label {label}": value for label, value in zip(self.plan.labels, noised, strict=True)}

    def metrics(self, correct: Callable[[], tuple[float, int]], round: int) -> dict[str, float]:
        """Return how many records the received model classifies correctly, and of how many; empty unless plan and policy want it.

        Args:
            correct: Computes both, once they are charged. One unit changes each by one at most: the sensitivity of the pair is
                √2.
        """
        if not self.plan.disclosures.local_metrics or self.policy.disclosures.local_metrics == "none":
            return {}
        if self.policy.disclosures.local_metrics == "clear":
            self.account.record_unprotected(round, "local metrics")
            right, records = map(float, correct())
        else:
            charge = self.account.reserve(round, self._one(), "local metrics")
            right, records = self.account.noised(correct(), math.sqrt(2))
            self.account.ledger.settle(charge, 1)
        return {"correct": right, "records": records}

    def loss(self, total: Callable[[float], float], count: int, round: int) -> dict[str, float]:
        """Return the received model's mean loss in nats; empty unless the plan's strategy asks for it.

        With noise, the loss of a record is cut at the policy's ceiling, which is then the sensitivity of the sum, and the divisor
        is the public number of records. Without privacy the delta reveals more than the loss, and no noise is added.

        Args:
            total: c -> Σ min(ℓ_i, c) over the own records, once that is charged.
            count: How many records there are.

        Raises:
            RunError: The loss is not finite.
        """
        if "loss" not in self.plan.strategy.sends:
            return {}
        if self.policy.disclosures.local_loss == "noised" and self.account.budget is not None:
            ceiling = self.policy.disclosures.loss_ceiling
            declared = self.account.public_examples
            charge = self.account.reserve(round, self._one(), "local loss")
            [noised] = self.account.noised([total(ceiling)], ceiling)
            self.account.ledger.settle(charge, 1)
            return {"loss": min(max(noised / declared, 0.0), ceiling)}
        self.account.record_unprotected(round, "local loss")
        mean = total(math.inf) / count
        if not math.isfinite(mean):
            raise RunError(
                f"the received model's loss is {mean}: expected a finite one, as the plan weighs updates by it",
                code="run.loss_not_finite",
            )
        return {"loss": mean}

    def _one(self) -> Steps:
        return Steps(self.policy.disclosures.noise_multiplier, 1.0, 1)


def reported_noise(
    account: Account,
    sigma: float,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, float] | None:
    """Return parameter name -> variance of the noise on each entry of its delta; None where plan and policy do not want it.

    All of it follows from public numbers.

    Args:
        sigma: The noise multiplier of the round.
    """
    plan = account.plan
    policy = account.policy
    examples = account.public_examples
    if not (plan.strategy.compares_noise and policy.disclosures.noise_level and isinstance(plan.privacy, RecordPrivacy)):
        return None
    scale = sigma * plan.privacy.clip_norm / (stage.local.sample_rate(examples) * examples)  # σC/B
    return noise_variance(stage.local, optimizer, parameters, scale=scale, steps=stage.local.steps_per_round(examples))


def noise_variance(
    local: LocalTraining, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, scale: float, steps: int
) -> dict[str, float]:
    """Return the variance of each parameter's noise after `steps` steps, to 3 significant digits.

    Args:
        scale: σC/B, the standard deviation of the noise on a step's gradient.
    """
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in parameters.items():
        settings = LocalOptimizer(local.optimizer, rates[id(parameter)], local.momentum, local.weight_decay)
        variance = delta_noise_variance(settings, noise_multiplier=scale, clip_norm=1.0, expected_batch=1.0, steps=steps)
        found[name] = float(f"{variance:.3g}")
    return found


def disclose(account: Account, round: int, setup: TrainingSetup) -> dict[str, float]:
    """Compute what plan and policy let the organization disclose about its records and the received model.

    Returns:
        Figure -> value; each is charged before a record takes part in it.

    Args:
        account: Of the run; every disclosure is charged to it.
        round: Number of the round, from 1.
        setup: The records, and the model as received.

    Raises:
        RunError: The received model's loss is not finite.
    """
    disclosures = Disclosures(account)
    return {
        **disclosures.histogram(lambda: list(account.dataset.label_counts().values())),
        **disclosures.metrics(lambda: count_correct(setup), round),
        **disclosures.loss(lambda ceiling: total_loss(setup, ceiling), account.true_examples, round),
    }


@torch.no_grad()
def count_correct(setup: TrainingSetup) -> tuple[float, int]:
    """Count the units that the module classifies correctly (of a unit: the fraction of its records), and all units."""
    return setup.sum_over_units(setup.correct), len(setup.units)


@torch.no_grad()
def total_loss(setup: TrainingSetup, ceiling: float) -> float:
    """Sum min(ℓ_i, ceiling), in nats; of a unit the mean over its records, so that it changes the sum by the ceiling at most.

    A record whose loss is not a number counts for the ceiling, as a failure would reveal it.
    """

    def bounded(batch: Batch) -> Tensor:
        losses = setup.loss(batch).double()  # first: the ceiling in another precision might be above it
        return losses.nan_to_num(nan=ceiling, posinf=ceiling).clamp(0.0, ceiling)

    return setup.sum_over_units(bounded)
