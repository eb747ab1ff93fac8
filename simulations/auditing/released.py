"""What an engine releases, seen from inside: the noised sum of every step, as it reaches the optimizer.

Whatever leaves a site (a parameter, a delta, the optimizer's state) is made of these sums and of public numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cotune.privacy.auditing.drawn_noise import DrawnNoise, Run, examine
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from cotune.privacy.mechanisms.per_example import Batches, LossPerExample, Unit

Engine = Callable[[DPSGDConfig], DPSGD]  # `DPSGD` itself, or another implementation to audit

_DRAWS = 2**19  # of a run, about
_MAX_STEPS = 64
_UNITS = 32  # whose batches are computed, with a loss of zero


@dataclass(frozen=True)
class Subject:
    """An engine, and what it trains on which units.

    Attributes:
        engine: Builds what takes the private steps.
        module: Is trained.
        loss: Of a batch, per record.
        units: Rows of each unit.
        batches: Rows -> batches of them.
    """

    engine: Engine
    module: nn.Module
    loss: LossPerExample
    units: Sequence[Unit]
    batches: Batches


def watch(optimizer: torch.optim.Optimizer, parameter: Tensor, batch: float, seen: Callable[[Tensor], None]) -> None:
    """Call `seen` in every step of the optimizer with the sum B·g that reaches a parameter, in float64."""

    def before_step(*_: Any) -> None:
        if parameter.grad is not None:
            seen(parameter.grad.detach().double() * batch)

    optimizer.register_step_pre_hook(before_step)


def collect_released_sums(
    subject: Subject, mechanism: DPSGDConfig, *, noise_generator: np.random.Generator | None = None
) -> list[list[Tensor]]:
    """Run an engine without moving the module.

    Args:
        noise_generator: Of the noise, in place of the engine's own.

    Returns:
        For each step the noised sums of the trained parameters, in float64 on the CPU, in units of the gradient.
    """
    parameters = [p for p in subject.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    found: list[list[Tensor]] = []

    def before_step(*_: Any) -> None:
        sums = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
        found.append([total.double().mul_(mechanism.expected_batch).cpu() for total in sums])

    optimizer.register_step_pre_hook(before_step)
    setup = DPSGDSetup(subject.module, optimizer, subject.loss, subject.units, subject.batches, noise_generator=noise_generator)
    for _ in subject.engine(mechanism).run(setup):
        pass
    return found


def draw_noise(subject: Subject, mechanism: DPSGDConfig, error: float) -> DrawnNoise:
    """Test the noise of an engine on real batches whose loss is zero, so that nothing else is released.

    Two runs that begin in the same state of every generator that a plan could seed: what is drawn must be another noise.

    Args:
        error: As of `drawn_noise.examine`.
    """
    entries = sum(p.numel() for p in subject.module.parameters() if p.requires_grad)
    steps = min(_MAX_STEPS, max(2, _DRAWS // entries))
    scale = mechanism.noise_multiplier * mechanism.clip_norm
    idle = replace(subject, loss=lambda batch: 0.0 * subject.loss(batch), units=subject.units[:_UNITS])

    def run() -> Run:
        parts = zip(*collect_released_sums(idle, replace(mechanism, steps=steps)), strict=True)
        return [torch.stack([s.reshape(-1).div_(scale).float() for s in part]).numpy() for part in parts]

    runs = []
    for _ in range(2):
        with _restored_generators():
            runs.append(run())
    return examine(runs, error)


@contextmanager
def _restored_generators() -> Iterator[None]:
    """Every seeded generator afterwards in the state of before."""
    python = random.getstate()
    legacy = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
