"""What a data set adds to one step of DP-SGD: the movement of a linear model, with noise that is the same for every data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from cotune.privacy.mechanisms.per_example import Batch
from tests.support.batches import in_batches


def movement(features: Tensor, targets: Sequence[int], units: Sequence[Sequence[int]], clip_norm: float) -> Tensor:
    """Return the noised sum of all units' contributions: minus what a step of SGD at a rate of 1 moves, where everybody is sampled.

    features: (n, d), of a head for two classes.
    """
    module = nn.Linear(features.shape[1], 2)
    for p in module.parameters():
        nn.init.zeros_(p)
    records: list[Batch] = [{"x": x, "y": torch.tensor(y)} for x, y in zip(features, targets, strict=True)]
    config = DPSGDConfig(noise_multiplier=1.0, clip_norm=clip_norm, sample_rate=1.0, expected_batch=1.0, steps=1)
    setup = DPSGDSetup(
        module,
        torch.optim.SGD(module.parameters(), lr=1.0),
        lambda batch: functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none", ignore_index=-100),
        units,
        in_batches(records, 8),
        noise_generator=np.random.default_rng(0),
    )
    assert len(list(DPSGD(config).run(setup))) == 1
    return -torch.cat([p.detach().flatten() for p in module.parameters()])
