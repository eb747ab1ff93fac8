"""What a unit contributes to a sum: its gradient, clipped and rounded to a grid; and the exact sum of such contributions.

Contract: for any finite gradient of a unit, its contribution is a vector of whole grid steps with an L2 norm of at most C over
all trained parameters, and a function of that gradient alone; the sum of contributions is exact. Adding or removing a unit
therefore changes the sum by exactly its contribution. Flat clipping: Abadi et al., CCS 2016, algorithm 1. Per-layer clipping:
each parameter tensor by itself to C/√L, so that all L together stay within C (McMahan et al., ICLR 2018, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cotune.privacy.mechanisms.factored_gradients import RowGradients, Scratch, norms_of, pieces_of
from cotune.privacy.mechanisms.grid_noise import Grid

ClippingMode = Literal["flat", "per_layer"]  # one norm for the whole gradient | C/√L for each of the L parameter tensors


def clip_factors(
    gradients: Sequence[RowGradients], clip_norm: float, clipping_mode: ClippingMode, scratch: Scratch | None = None
) -> list[Tensor]:
    """Return min(1, C/‖g_i‖) for each unit i, as (k,) in float64, once for each parameter tensor; 0 for one that is not finite.

    Args:
        gradients: Of k units, for each parameter. Norms are taken in float64, where no sum of squares of float32 overflows.
        clip_norm: C > 0.
        scratch: Where pieces of gradients are put.
    """
    scratch = scratch or Scratch()
    norms = [torch.cat([norms_of(piece) for _, piece in pieces_of(g, scratch)]) for g in gradients]
    whole = torch.stack(norms).square_().sum(dim=0).sqrt_()
    if clipping_mode == "flat":
        return [_finite_shrinkage(whole, whole, clip_norm)] * len(gradients)
    share = clip_norm / math.sqrt(len(gradients))
    return [_finite_shrinkage(norm, whole, share) for norm in norms]


def _finite_shrinkage(norms: Tensor, whole: Tensor, bound: float) -> Tensor:
    return torch.where(whole.isfinite(), shrinkage(norms, bound), 0.0)


def shrinkage(norms: Tensor, bound: float) -> Tensor:
    """Return min(1, bound / norm) for each norm, in float64."""
    return (bound / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp_(max=1.0)


class ExactSum:
    """The sum Σ_i round(c_i / step), where c_i is the clipped gradient of unit i: integers, in float64.

    Args:
        like: The trained parameters: their shapes and device.
        grid: Of `noise.choose_grid`, for as many entries as `like` has.
        clipping_mode: What is clipped to the norm: the gradient as a whole, or each parameter tensor to its share.
    """

    def __init__(self, like: Sequence[Tensor], grid: Grid, clipping_mode: ClippingMode) -> None:
        self._grid = grid
        self._clipping_mode: ClippingMode = clipping_mode
        self._like = list(like)
        self._steps: list[Tensor | None] = [None] * len(self._like)
        self._scratch = Scratch()

    @torch.no_grad()
    def add(self, gradients: list[RowGradients]) -> None:
        """Add the contributions of k units, of which those count that are finite.

        The list is emptied, and gradients are overwritten: what is added takes the place of what it was made of.
        """
        factors = clip_factors(gradients, self._grid.max_norm, self._clipping_mode, self._scratch)
        for number, factor in zip(range(len(self._like)), factors, strict=True):
            total = self._steps[number] = self._total(number)
            _add_rounded(total, gradients.pop(0), factor, self._grid, self._scratch)

    def totals(self) -> list[Tensor]:
        """Return the sums in units of the gradient, float64: whole multiples of the grid's step."""
        return [self._total(number) * self._grid.step for number in range(len(self._like))]

    def _total(self, number: int) -> Tensor:
        """Steps of a parameter so far; of none before something is added: by then memory for gradients has been given back."""
        found = self._steps[number]
        like = self._like[number]
        return torch.zeros(like.shape, dtype=torch.float64, device=like.device) if found is None else found


def _add_rounded(total: Tensor, gradients: RowGradients, factors: Tensor, grid: Grid, scratch: Scratch) -> None:
    """Add round(f_i·g_i / step) to the total for each of n units: whole numbers, of which float32 adds a few exactly, too."""
    most = _rows_in_float32(grid)
    held = scratch.shaped("sum", total.shape, total, torch.float32)  # the sum of `count` rows
    count = 0
    for rows, piece in pieces_of(gradients, scratch):
        scaled = _round_clipped(piece, factors[rows], grid.step)
        if scaled.dtype != torch.float32 or len(scaled) > most:
            total += scaled.sum(dim=0, dtype=torch.float64)
            continue
        if count + len(scaled) > most:
            total += held
            count = 0
        part = scaled[0] if len(scaled) == 1 else scaled.sum(dim=0)
        if count:
            held += part
        else:
            held.copy_(part)
        count += len(scaled)
    if count:
        total += held


def _rows_in_float32(grid: Grid) -> int:
    """How many contributions add up to at most 2²⁴ steps in any entry, whatever they are: C' each, and what rounding adds."""
    return int(2**24 / (grid.max_norm * (1 + 2.0**-20) / grid.step + 1))


def _round_clipped(gradients: Tensor, factors: Tensor, step: float) -> Tensor:
    """Return round(f_i·g_i / step) for each of k units, in place unless they are narrower than float32, for whose rounding the
    clip norm is lowered."""
    if gradients.element_size() < 4:
        gradients = gradients.float()
    scale = (factors / step).to(gradients.dtype).reshape(-1, *[1] * (gradients.dim() - 1))
    scaled = gradients.mul_(scale).round_()
    if not bool(factors.all()):
        scaled[factors == 0] = 0.0
    return scaled
