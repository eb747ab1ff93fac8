"""The clipped sum of gradients that are outer products, without a gradient for each row: of one linear layer, as most heads are.

Of y = W·x + b with one vector a row, row i has the gradient a_i ⊗ x_i for W and a_i for b, where a_i = ∂ℓ_i/∂y_i. Its norm is
‖a_i‖·√(‖x_i‖² + 1) (Goodfellow 2015, https://arxiv.org/abs/1510.01799, equation 5), and the sum over all rows is one product of
two matrices.

That product must be exact: in a sum that rounds, a row would change what it does to the others (see `per_example`). So both
factors are rounded first, the direction x_i/‖x_i‖ and the clipped a_i·‖x_i‖, to whole numbers. Products and sums of whole numbers
below 2⁵³ are exact in float64, in whichever order they are added; sums of many rows are kept in int64.

Contract, as that of `per_example`: what a row contributes is a function of its own a_i and x_i, with an L2 norm of at most C; the
sum is exact. Its grid is finer than that of the noise, to which the sum is rounded at last: `ClippedSum` leaves room for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cotune.errors import PrivacyError
from cotune.privacy.mechanisms.exact_sum import ClippingMode, shrinkage
from cotune.privacy.mechanisms.linear_gradients import OuterProducts

_BITS = 16  # of a direction of length 1, and of a gradient of norm C: products are below 2³³
_SHORTEST = 1e-150  # a vector below that has no direction
_CHUNK = 2**18  # entries of directions that are handled at a time: they stay in the processor's cache, and their sums below 2⁵¹
_MARGIN = 1 - 2.0**-30  # of float64 arithmetic on factors


class OuterProductSum:
    """The sum of the contributions of rows, clipped and quantized.

    Args:
        like: The layer's weight (outputs, inputs) and, where it is trained, its bias (outputs,).
        clip_norm: C.
        grid_step: Of the noise, a power of two. None, as in checks: nothing is rounded, and the sum is right to float64.
        clipping_mode: What is clipped to the norm: the gradient as a whole, or each parameter tensor to its share.

    Raises:
        PrivacyError: For a layer so large that rounding alone could take half of C.
    """

    def __init__(self, like: Sequence[Tensor], clip_norm: float, *, grid_step: float | None, clipping_mode: ClippingMode) -> None:
        self._grid_step = grid_step
        self._direction_step = 2.0**-_BITS
        self._gradient_step = 2.0 ** (math.floor(math.log2(clip_norm)) - _BITS)
        self._clipping_mode: ClippingMode = clipping_mode
        self._steps = [torch.zeros(p.shape, dtype=self._dtype, device=p.device) for p in like]
        self._max_norm = clip_norm if grid_step is None else self._reduced(clip_norm)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self._grid_step is None else torch.int64

    def _reduced(self, clip_norm: float) -> float:
        """C' ≤ C: factors whose product has at most this norm give a contribution of at most C once they are rounded.

        A direction grows from 1 to at most 1 + √d·step/2, and the gradient's k entries by √k·step/2.
        """
        outputs, inputs = self._steps[0].shape
        direction = 1 + self._direction_step * math.sqrt(inputs) / 2
        left = clip_norm / direction - self._gradient_step * math.sqrt(outputs * len(self._steps)) / 2
        if not left > clip_norm / 2:
            raise PrivacyError(
                f"a layer of {inputs} inputs and {outputs} outputs leaves no room for rounding below the clip norm"
                f" {clip_norm:g}: expected a smaller one",
                code="privacy.too_many_parameters",
            )
        return left * _MARGIN

    def add(self, rows: OuterProducts) -> None:
        """Add the contributions of some rows; one without a finite gradient contributes nothing."""
        size = max(1, _CHUNK // rows.inputs.shape[1])
        for start in range(0, len(rows.inputs), size):
            self._add(rows.above[start : start + size], rows.inputs[start : start + size])

    def _add(self, above: Tensor, inputs: Tensor) -> None:
        above = above.to(torch.float64)
        directions = inputs.to(torch.float64, copy=True)
        lengths = torch.linalg.vector_norm(directions, dim=1)
        sizes = torch.linalg.vector_norm(above, dim=1)
        finite = (lengths * sizes).isfinite()
        if not bool(finite.all()):
            above = torch.where(finite[:, None], above, 0.0)
            directions[~finite] = 0.0
            lengths = torch.where(finite, lengths, 0.0)
            sizes = torch.where(finite, sizes, 0.0)
        scale = torch.where(lengths > _SHORTEST, 1 / (lengths * self._direction_step), 0.0)
        shrunk = self._shrinkages(lengths, sizes)
        self._round(directions.mul_(scale[:, None]))
        weights = self._round(above * (lengths * shrunk[0] / self._gradient_step)[:, None])
        self._steps[0] += (weights.T @ directions).to(self._dtype)
        if len(self._steps) > 1:
            self._steps[1] += self._round(above * (shrunk[1] / self._gradient_step)[:, None]).sum(dim=0).to(self._dtype)

    def _round(self, factors: Tensor) -> Tensor:
        """Round in place, where factors are rounded at all."""
        return factors if self._grid_step is None else factors.round_()

    def _shrinkages(self, lengths: Tensor, sizes: Tensor) -> list[Tensor]:
        """What clipping multiplies each row's gradient with: (b,) for each parameter tensor."""
        if self._clipping_mode == "flat":
            whole = sizes * (lengths.square() + (len(self._steps) - 1)).sqrt()  # the bias reads a one
            return [shrinkage(whole, self._max_norm)] * len(self._steps)
        share = self._max_norm / math.sqrt(len(self._steps))
        return [shrinkage(norms, share) for norms in (sizes * lengths, sizes)[: len(self._steps)]]

    def totals(self) -> list[Tensor]:
        """Return the sums in units of the gradient, float64: rounded to whole steps of the grid, where there is one."""
        steps = (self._direction_step * self._gradient_step, self._gradient_step)
        return [self._on_grid(total, step) for total, step in zip(self._steps, steps, strict=False)]

    def _on_grid(self, total: Tensor, step: float) -> Tensor:
        if self._grid_step is None or self._grid_step <= step:
            return total.double() * step
        bits = round(math.log2(self._grid_step / step))  # both are powers of two: a shift rounds down, as a division would
        return torch.bitwise_right_shift(total + 2 ** (bits - 1), bits).double() * self._grid_step
