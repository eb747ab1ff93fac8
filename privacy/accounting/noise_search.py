"""Where the noise multiplier σ of a budget is looked for: each σ that is tried costs a composition of privacy losses.

Nothing here decides whether a budget is kept. What is found depends on the question alone, and not on what was asked before: an
organization finds the same σ as the server that forecasts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

_LEAST_STEP = 0.01  # of ln σ
_MOST_STEP = 2.0


def estimate_noise(planned: Sequence[tuple[float, int]], target: float, delta: float) -> float:
    """Return roughly σ for some steps; infinity where no noise seems to suffice.

    Many steps are about as private as one Gaussian mechanism with μ² = Σ q²·(e^(1/σ²) - 1) (Dong, Roth, Su 2019, corollary 5.4),
    and that is (ε, δ)-private for ε = μ²/2 + μ·√(2·ln 1/δ) (Bun & Steinke 2016, proposition 1.3).

    Args:
        planned: (sample rate, number of steps).
        target: ε.
        delta: δ.
    """
    tail = -math.log(delta)
    mu = math.sqrt(2) * (math.sqrt(tail + max(target, 0.0)) - math.sqrt(tail))
    squares = sum(count * q**2 for q, count in planned)
    inverse = math.log1p(mu**2 / squares) if squares else math.inf  # 1/σ²
    return 1 / math.sqrt(inverse) if inverse else math.inf


def bracket_root(
    gap: Callable[[float], float], start: float, bounds: tuple[float, float], target: float
) -> tuple[float, float] | None:
    """Return two points between which a falling function changes its sign, near a start; None where it keeps its sign.

    A step is as long as ε would have to fall, as ε falls with σ at least as fast as 1/σ does: most often two values suffice.

    Args:
        gap: ln σ -> ε - target.
        start: Where the search begins.
        bounds: The smallest and the largest ln σ.
        target: ε.

    Returns:
        (x, y) with gap(x) > 0 >= gap(y).
    """
    least, most = bounds
    at = before = min(max(start, least), most)
    falling = gap(at) > 0
    while (gap(at) > 0) == falling:
        if at == (most if falling else least):
            return None
        before = at
        at = min(at + _step(gap(at), target), most) if falling else max(at - _step(gap(at), target), least)
    return (before, at) if falling else (at, before)


def _step(gap: float, target: float) -> float:
    ratio = 1 + gap / target if target > 0 else math.inf
    return min(max(abs(math.log(ratio)), _LEAST_STEP), _MOST_STEP) if 0 < ratio < math.inf else _MOST_STEP
