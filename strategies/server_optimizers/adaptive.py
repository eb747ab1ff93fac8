"""The step that the adaptive server optimizers share, in which every coordinate has its own rate.

Reddi et al., ICLR 2021, https://arxiv.org/abs/2003.00295, algorithm 2: no bias correction, and v starts at τ². The optimizers
differ in how they update v.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cotune.strategies.types import Delta, apply_delta

# of the names in the memory
_FIRST = "m/"
_SECOND = "v/"


def adaptive_step(
    state: Mapping[str, Tensor],
    delta: Delta,
    memory: Mapping[str, Tensor],
    *,
    rate: float,
    beta1: float,
    tau: float,
    second_moment: Callable[[Tensor, Tensor], Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take the step m = β1·m + (1 − β1)·D, θ += rate·m / (√v + τ), in float64.

    Args:
        state: θ.
        delta: D; parameters without a delta stay as they are and keep their moments.
        memory: The moments m and v by parameter; a missing m is 0, a missing v is τ².
        rate: Learning rate of the round.
        beta1: β1.
        tau: τ.
        second_moment: (v, D²) -> v.

    Returns:
        (θ, memory) after the step.
    """
    steps = dict[str, Tensor]()
    moments = dict[str, Tensor]()
    for name, tensor in delta.items():
        d = tensor.to(torch.float64)
        m = beta1 * memory.get(_FIRST + name, torch.zeros_like(d)) + (1 - beta1) * d
        v = second_moment(memory.get(_SECOND + name, torch.full_like(d, tau**2)), d.square())
        steps[name] = rate * m / (v.sqrt() + tau)
        moments |= {_FIRST + name: m, _SECOND + name: v}
    return apply_delta(state, steps), {**memory, **moments}
