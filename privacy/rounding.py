"""Printing ε so that it never reads smaller than it is."""

from __future__ import annotations

import math

__all__ = ["round_up", "two_digits"]


def round_up(epsilon: float) -> str:
    """ε with two digits after the point, never below what it is.

    >>> round_up(7.991), round_up(8.0)
    ('8.00', '8.00')
    """
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"


def two_digits(count: int) -> int:
    """A count rounded down to two significant digits: what a simulated organization declares.

    >>> two_digits(1237), two_digits(99), two_digits(7)
    (1200, 99, 7)
    """
    step: int = 10 ** max(0, len(str(count)) - 2)
    return count // step * step
