"""What the adaptive server optimizers have in common: a step that every coordinate takes at its own rate.

Reddi et al., ICLR 2021, algorithm 2; it corrects no bias, and v starts at τ². They differ in how v goes on.
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
    """m = β1·m + (1 − β1)·D and θ += rate·m / (√v + τ), in float64; (θ, memory) after it.

    second_moment: (v, D²) -> v. A parameter without a delta keeps its moments.
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
