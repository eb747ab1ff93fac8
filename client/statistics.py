"""What some fusions want beside a delta: squared gradients and inputs of the trained model on the own records, without noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotune.client.training_rows import Setting
from cotune.models.errors import PrivacyError
from cotune.models.sharing import SharedModel
from cotune.plan.schema import Plan
from cotune.plan.statistics import gram_layers
from cotune.privacy.config import RecordPrivacy


def statistics_of(plan: Plan, model: SharedModel, names: Sequence[str], setting: Setting) -> dict[str, Tensor]:
    """The arrays of `plan.statistics.statistic_shapes`, float32 on the CPU; empty unless the plan's fusion wants some.

    names: parameters that travel. The model must be set to the state after training. Raises PrivacyError under record-level
    privacy, which no noise here would keep. Costs one backward pass per record (fisher), one forward pass over all
    records (gram) and, for as long as it takes, 8 bytes for each entry.
    """
    found: dict[str, Tensor] = {}
    if isinstance(plan.privacy, RecordPrivacy) and {"fisher", "gram"} & set(plan.strategy.sends):
        raise PrivacyError("the plan asks for statistics of the records that no noise protects: expected privacy = none")
    if "fisher" in plan.strategy.sends:
        found |= {f"fisher/{name}": f for name, f in _fisher(dict(model.parameters()), names, setting).items()}
    if "gram" in plan.strategy.sends:
        found |= {f"gram/{name}": g for name, g in _grams(model, names, setting).items()}
    return {name: tensor.to("cpu", torch.float32) for name, tensor in found.items()}


def _fisher(own: dict[str, nn.Parameter], names: Sequence[str], setting: Setting) -> dict[str, Tensor]:
    """The mean over the records of each record's squared gradient: the diagonal of the empirical Fisher information."""
    parameters = [own[name] for name in names]
    squares = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for row in range(setting.rows):
        loss = setting.exact(setting.alone(row)).sum()
        for square, gradient in zip(squares, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                square += gradient.double().square()
    return {name: square / setting.rows for name, square in zip(names, squares, strict=True)}


@torch.no_grad()
def _grams(model: SharedModel, names: Sequence[str], setting: Setting) -> dict[str, Tensor]:
    """XᵀX / n of every trained linear layer: X has a row for each position of a record that is not padding, and a column of ones
    where the bias is trained.
    """
    layers, grams, mask = gram_layers(model, names), dict[str, Tensor](), _Mask()
    hooks = []
    for name, (layer, with_bias) in layers.items():
        size = layer.in_features + with_bias
        grams[name] = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device)
        hooks.append(layer.register_forward_pre_hook(_adding(grams[name], with_bias, mask)))
    try:
        for _, batch in setting.everything():
            mask.now = batch.get("attention_mask")
            setting.exact(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gram / setting.rows for name, gram in grams.items()}


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
