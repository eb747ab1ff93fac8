"""How updates travel: the codecs that a plan can name, and by how much their rounding can lengthen an update.

The codecs themselves are in `protocol.codecs`; this is what a plan, and a bound that follows from it, must know of them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

Codec = Literal["float32", "bfloat16", "int8", "int4"]
BLOCK = 64  # values of an array that share an exponent, in int8 and int4


def largest_integer(bits: int) -> int:
    """Return the largest integer of a signed format without its lowest number, so that it is symmetric: 127, or 7."""
    return (1 << (bits - 1)) - 1


@cache
def compute_growth(codec: Codec) -> float:
    """Return the supremum of ‖rounded‖₂ / ‖values‖₂ over all values and all draws of the stochastic rounding.

    bfloat16 moves a value v by less than 2⁻⁷·|v|. In a block of integers a value of k + 0 steps can become k + 1, and the largest
    one has more than half of the largest integer L, as the step would be halved otherwise: with m and k the integers below the
    largest value and below the others,

        sup ‖r‖² / ‖v‖² = max_{m, k} ((m + 1)² + (BLOCK − 1)·(k + 1)²) / (max(m, L/2)² + (BLOCK − 1)·k²).

    One k for all others suffices: at the maximum ρ each of them maximizes (k + 1)² − ρ·k² by itself. Values below the smallest
    step, 2⁻¹²⁶, are left aside.
    """
    if codec == "float32":
        return 1.0
    if codec == "bfloat16":
        return 1 + 2**-7
    limit = largest_integer(8 if codec == "int8" else 4)
    others = BLOCK - 1
    return math.sqrt(
        max(
            ((m + 1) ** 2 + others * (k + 1) ** 2) / (max(m, limit / 2) ** 2 + others * k**2)
            for m in range(limit // 2, limit)
            for k in range(m + 1)
        )
    )
