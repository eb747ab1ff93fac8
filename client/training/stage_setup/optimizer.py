"""The optimizer of local training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cotune.models.trainable import TrainableModel
from cotune.plan.local_training import LocalTraining


def build_optimizer(
    local: LocalTraining, model: TrainableModel, names: list[str], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the stage's optimizer, with the head in a group of its own learning rate.

    Args:
        local: Optimizer, learning rates, momentum and weight decay.
        model: Tells parameters of the head from those of the encoder.
        names: Names of the trained parameters.
        parameters: The parameters, in the order of the names.
    """
    head = [p for n, p in zip(names, parameters, strict=True) if not n.startswith(model.prefix)]
    encoder = [p for n, p in zip(names, parameters, strict=True) if n.startswith(model.prefix)]
    head_rate = local.head_learning_rate if encoder and local.head_learning_rate else local.learning_rate
    groups: list[dict[str, Any]] = [{"params": encoder, "lr": local.learning_rate}] if encoder else []
    groups.append({"params": head, "lr": head_rate})
    if local.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=local.momentum, weight_decay=local.weight_decay)
    adam = torch.optim.AdamW if local.optimizer == "adamw" else torch.optim.Adam
    return adam(groups, weight_decay=local.weight_decay)
