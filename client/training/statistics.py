"""Statistics of the records that some fusions need (squared gradients, products of inputs): without noise.

Never under record-level privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.errors import PrivacyError
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import gram_layers
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.per_example import Batch


def statistics_of(plan: Plan, model: TrainableModel, names: Sequence[str], setup: TrainingSetup) -> dict[str, Tensor]:
    """Compute the statistics that the plan's fusion needs, float32 on the CPU; empty where it needs none.

    Costs one backward pass per record (fisher), or one forward pass over all records (gram), and 8 bytes for each entry
    meanwhile.

    Args:
        model: Set to the state after training.
        names: The parameters that are shared.

    Returns:
        The arrays of `plan.trained_parameters.statistic_shapes`.

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

    def begin() -> None:
        for gram in grams.values():
            gram.zero_()

    def add(_: Tensor, batch: Batch) -> None:
        mask.now = batch.get("attention_mask")
        setup.exact(batch)

    try:
        setup.visit_all(begin, add)
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
