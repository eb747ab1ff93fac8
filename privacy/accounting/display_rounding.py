"""Round numbers for display: ε up, so that it never reads smaller than it is, and counts down."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal

_EXACT = 1e12  # below, two digits after the point are


def round_up(epsilon: float) -> str:
    """Return ε with two digits after the point, rounded up; any number that was stated or stored can be shown.

    >>> round_up(7.991), round_up(8.0), round_up(1e308), round_up(float("nan"))
    ('8.00', '8.00', '1.01e+308', '∞')
    """
    if not _is_finite(epsilon):
        return "−∞" if epsilon < 0 else "∞"  # what is not a number bounds nothing
    if abs(epsilon) < _EXACT:
        return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"
    rounded = Context(prec=3, rounding=ROUND_CEILING).create_decimal(Decimal(epsilon))
    return f"{rounded:e}"


def round_up_number(epsilon: float) -> float:
    """Return ε rounded up as `round_up` does, as a number."""
    return math.ceil(epsilon * 100 - 1e-9) / 100 if _is_finite(epsilon) and abs(epsilon) < _EXACT else epsilon


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # an integer may be larger than any float


def round_to_two_digits(count: int) -> int:
    """Return a count rounded down to two significant digits: what a simulated organization declares.

    >>> [round_to_two_digits(number) for number in (1237, 99, 7)]
    [1200, 99, 7]
    """
    step: int = 10 ** max(0, len(str(count)) - 2)
    return count // step * step
