"""What an organization discloses to the server beside its delta, as far as plan and policy agree.

- Label histogram, metrics and loss: with noise, a Gaussian mechanism on sums that one record changes by a known amount at most,
  charged to the ledger before they are computed. What is disclosed once per run is drawn once and kept, so that asking again
  reveals nothing new.
- The variance of the privacy noise in its delta, which follows from public numbers.
- Statistics that some fusions need (squared gradients, products of inputs): without noise, never under record-level privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotune.client.account import Account
from cotune.client.training.rows import TrainingSetup
from cotune.errors import PrivacyError, RunError
from cotune.models.trainable import TrainableModel
from cotune.plan.local_training import LocalTraining, Stage
from cotune.plan.parameters import gram_layers
from cotune.plan.schema import Plan
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.update_noise import LocalOptimizer, delta_noise_variance


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
        if not (self.plan.tell.label_histogram and self.policy.tell.label_histogram == "noised"):
            return {}
        noised = self.account.once("label histogram", counts)
        return {f"label {label}": value for label, value in zip(self.plan.labels, noised, strict=True)}

    def metrics(self, correct: Callable[[], tuple[float, int]], round: int) -> dict[str, float]:
        """Return how many records the received model classifies correctly, and of how many; empty unless plan and policy want it.

        Args:
            correct: Computes both, once they are charged. One unit changes each by one at most: the sensitivity of the pair is
                √2.
        """
        if not self.plan.tell.local_metrics or self.policy.tell.local_metrics == "none":
            return {}
        if self.policy.tell.local_metrics == "clear":
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
        if self.policy.tell.local_loss == "noised" and self.account.budget is not None:
            ceiling = self.policy.tell.loss_ceiling
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
        return Steps(self.policy.tell.noise_multiplier, 1.0, 1)


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
    if not (plan.strategy.compares_noise and policy.tell.noise_level and isinstance(plan.privacy, RecordPrivacy)):
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


def statistics_of(plan: Plan, model: TrainableModel, names: Sequence[str], setup: TrainingSetup) -> dict[str, Tensor]:
    """Compute the statistics that the plan's fusion needs, float32 on the CPU; empty where it needs none.

    Costs one backward pass per record (fisher), or one forward pass over all records (gram), and 8 bytes for each entry
    meanwhile.

    Args:
        model: Set to the state after training.
        names: The parameters that are shared.

    Returns:
        The arrays of `plan.parameters.statistic_shapes`.

    Raises:
        PrivacyError: The plan promises record-level privacy, which these would break.
    """
    found: dict[str, Tensor] = {}
    if isinstance(plan.privacy, RecordPrivacy) and {"fisher", "gram"} & set(plan.strategy.sends):
        raise PrivacyError(
            "the plan asks for statistics of the records that no noise protects: expected privacy = none",
            code="privacy.unprotected_statistics",
        )
    if "fisher" in plan.strategy.sends:
        found |= {f"fisher/{name}": f for name, f in _fisher(dict(model.parameters()), names, setup).items()}
    if "gram" in plan.strategy.sends:
        found |= {f"gram/{name}": g for name, g in _grams(model, names, setup).items()}
    return {name: tensor.to("cpu", torch.float32) for name, tensor in found.items()}


def _fisher(own: dict[str, nn.Parameter], names: Sequence[str], setup: TrainingSetup) -> dict[str, Tensor]:
    """The mean over the records of each record's squared gradient: the diagonal of the empirical Fisher information."""
    parameters = [own[name] for name in names]
    squares = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for row in range(setup.rows):
        loss = setup.exact(setup.alone(row)).sum()
        for square, gradient in zip(squares, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                square += gradient.double().square()
    return {name: square / setup.rows for name, square in zip(names, squares, strict=True)}


@torch.no_grad()
def _grams(model: TrainableModel, names: Sequence[str], setup: TrainingSetup) -> dict[str, Tensor]:
    """XᵀX / n of every trained linear layer: X has a row for each position of a record that is not padding, and a column of ones
    where the bias is trained.
    """
    layers = gram_layers(model, names)
    grams = dict[str, Tensor]()
    mask = _Mask()
    hooks = []
    for name, (layer, with_bias) in layers.items():
        size = layer.in_features + with_bias
        grams[name] = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device)
        hooks.append(layer.register_forward_pre_hook(_adding(grams[name], with_bias, mask)))
    try:
        for _, batch in setup.everything():
            mask.now = batch.get("attention_mask")
            setup.exact(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gram / setup.rows for name, gram in grams.items()}


class _Mask:
    """Which positions of the batch of the moment are no padding: (b, t); None where there are no positions."""

    now: Tensor | None = None


def _adding(gram: Tensor, with_bias: bool, mask: _Mask) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        if mask.now is not None and x.dim() == 3 and x.shape[:2] == mask.now.shape:
            x = x[mask.now.bool()]
        x = x.reshape(-1, x.shape[-1]).double()
        if with_bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        gram.add_(x.T @ x)

    return add
