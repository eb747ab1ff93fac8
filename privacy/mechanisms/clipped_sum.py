"""The sum of what units contribute, whichever form their gradients have: entry by entry, or as outer products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from cotune.privacy.mechanisms.exact_sum import ClippingMode, ExactSum
from cotune.privacy.mechanisms.factored_gradients import RowGradients
from cotune.privacy.mechanisms.grid_noise import choose_grid, grid_step, quantized_clip_norm
from cotune.privacy.mechanisms.linear_gradients import OuterProducts
from cotune.privacy.mechanisms.outer_products import OuterProductSum


class ClippedSum:
    """Σ_i Q(c_i), c_i being the gradient of unit i clipped to C, and Q a rounding with ‖Q(c_i)‖ ≤ C: exact.

    The form of a unit's gradient depends on the unit alone, and so does what it contributes. Contributions of gradients entry by
    entry lie on the grid of the noise. Those of outer products do not: the sums of two neighbors differ by at most C'' then, and
    by at most C'' + step·√d = C once both are rounded to that grid.

    Args:
        like: The trained parameters: their shapes and device.
        clip_norm: C.
        noise_multiplier: σ of the noise that the sum gets, which decides how contributions are rounded; 0: finely.
        clipping_mode: What is clipped to the norm: the gradient as a whole, or each parameter tensor to its share.

    Raises:
        PrivacyError: If the parameters are so numerous that rounding alone could take half of C.
    """

    def __init__(self, like: Sequence[Tensor], clip_norm: float, noise_multiplier: float, clipping_mode: ClippingMode) -> None:
        grid = choose_grid(clip_norm, noise_multiplier, sum(p.numel() for p in like))
        self._entries: ExactSum | None = None
        self._products: OuterProductSum | None = None
        self._make_entries = partial(ExactSum, like, grid, clipping_mode)
        self._make_products = partial(_make_products, like, clip_norm, noise_multiplier, clipping_mode)

    def add(self, gradients: list[RowGradients] | OuterProducts) -> None:
        """Add the contributions of k units. The gradients may be overwritten, and a list of them is emptied."""
        if not isinstance(gradients, OuterProducts):
            self._entries = self._entries or self._make_entries()
            self._entries.add(gradients)
            return
        self._products = self._products or self._make_products()
        self._products.add(gradients)

    def totals(self) -> list[Tensor]:
        """Return the sums in units of the gradient, float64: with noise, whole multiples of the grid's step."""
        if self._products is None:
            return (self._entries or self._make_entries()).totals()
        totals = self._products.totals()
        if self._entries is None:
            return totals
        return [one + other for one, other in zip(self._entries.totals(), totals, strict=True)]


def _make_products(
    like: Sequence[Tensor], clip_norm: float, noise_multiplier: float, clipping_mode: ClippingMode
) -> OuterProductSum:
    if not noise_multiplier:
        return OuterProductSum(like, clip_norm, grid_step=None, clipping_mode=clipping_mode)
    entries = sum(p.numel() for p in like)
    inner = quantized_clip_norm(clip_norm, noise_multiplier, 4 * entries)  # C'': step·√d is half a step of 4·d entries
    step = grid_step(clip_norm, noise_multiplier)
    return OuterProductSum(like, inner, grid_step=step, clipping_mode=clipping_mode)
