"""One batch of a step, computed as in training, on made-up records: shows whether it fits into memory, and moves nothing."""

from __future__ import annotations

import torch

from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGDConfig, DPSGDSetup, clipped_sum
from cotune.privacy.mechanisms.per_example import MAX_HELD_ENTRIES

_BESIDE = 3  # tensors of the trained parameters' size: a gradient, and two that Adam keeps


def try_step(setup: TrainingSetup, privacy: RecordPrivacy | None) -> None:
    """Compute gradients of all rows, beside as much memory as training holds meanwhile. The parameters are left as they are.

    Args:
        setup: On as many made-up rows as one batch has.
        privacy: Of the plan; None: without.
    """
    trained = [p for p in setup.module.parameters() if p.requires_grad]
    beside = [torch.empty_like(p) for p in trained for _ in range(_BESIDE)]
    try:
        if privacy is None:
            _plain(setup)
        else:
            if privacy.unit != "record":
                beside.append(torch.empty(MAX_HELD_ENTRIES, device=trained[0].device))  # sums of units of several records
            _private(setup, privacy)
    finally:
        for p in trained:
            p.grad = None


def _plain(setup: TrainingSetup) -> None:
    for _, batch in setup.batches(range(setup.rows)):
        setup.loss(batch).sum().backward()  # type: ignore[no-untyped-call]


def _private(setup: TrainingSetup, privacy: RecordPrivacy) -> None:
    config = DPSGDConfig(
        noise_multiplier=1.0,  # decides how contributions are rounded; no noise is made
        clip_norm=privacy.clip_norm,
        sample_rate=1.0,
        expected_batch=float(setup.rows),
        steps=1,
        clipping_mode=privacy.clipping,
    )
    optimizer = torch.optim.SGD([p for p in setup.module.parameters() if p.requires_grad], lr=0.0)
    clipped_sum(DPSGDSetup(setup.module, optimizer, setup.loss, setup.units, setup.batches), config, setup.units)
