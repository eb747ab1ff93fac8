"""Printing ε so that it never reads smaller than it is."""

from __future__ import annotations

import math

__all__ = ["round_up"]


def round_up(epsilon: float) -> str:
    """ε with two digits after the point, never below what it is.

    >>> round_up(7.991), round_up(8.0)
    ('8.00', '8.00')
    """
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"
