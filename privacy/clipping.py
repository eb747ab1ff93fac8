"""What one unit contributes to a sum: its gradient, clipped to the norm C and rounded to a grid.

Contract: whatever finite gradient a unit has, its contribution is a vector of whole grid steps with an L2 norm of at most C over
all trained parameters, and a function of that gradient alone; the sum of contributions is exact. A unit more or less therefore
changes the sum by exactly its contribution. Flat clipping: Abadi et al., CCS 2016, algorithm 1. Per layer: each parameter tensor
by itself to C/√L, so that all L together stay within C (McMahan et al., ICLR 2018, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cotune.privacy.gaussian import Grid

Clipping = Literal["flat", "per_layer"]  # one norm for the whole gradient | C/√L for each of the L parameter tensors


def clip_factors(gradients: Sequence[Tensor], clip_norm: float, clipping: Clipping) -> list[Tensor]:
    """Return min(1, C/‖g_i‖) for each unit i, as (k,) in float64, once for each parameter tensor.

    Args:
        gradients: (k, *shape) for each parameter; finite. Norms are taken in float64, where no float32 entry overflows.
        clip_norm: C > 0.
    """
    squares = [g.reshape(len(g), -1).to(torch.float64, copy=True).square_().sum(dim=1) for g in gradients]
    if clipping == "flat":
        whole = torch.stack(squares).sum(dim=0).sqrt_()
        return [_factor(whole, clip_norm)] * len(gradients)
    share = clip_norm / math.sqrt(len(gradients))
    return [_factor(square.sqrt_(), share) for square in squares]


def _factor(norms: Tensor, bound: float) -> Tensor:
    return (bound / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp_(max=1.0)


class ExactSum:
    """Σ_i round(c_i / step), where c_i is the clipped gradient of unit i: whole numbers, in float64.

    Args:
        like: The trained parameters: their shapes and device.
        grid: Of `gaussian.grid_of`, for as many entries as `like` has.
    """

    def __init__(self, like: Sequence[Tensor], grid: Grid, clipping: Clipping) -> None:
        self._grid = grid
        self._clipping: Clipping = clipping
        self._steps = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in like]

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add the contributions of k units, given (k, *shape) for each parameter; what is given may be overwritten."""
        factors = clip_factors(gradients, self._grid.clip_norm, self._clipping)
        for total, gradient, factor in zip(self._steps, gradients, factors, strict=True):
            scale = (factor / self._grid.step).to(gradient.dtype).reshape(-1, *[1] * (gradient.dim() - 1))
            total += gradient.mul_(scale).round_().sum(dim=0, dtype=torch.float64)

    def totals(self) -> list[Tensor]:
        """Return the sums in units of the gradient, float64: whole multiples of the grid's step."""
        return [steps * self._grid.step for steps in self._steps]
