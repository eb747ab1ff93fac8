"""Private selection: only the best of a random number of runs is published.

Papernot & Steinke, "Hyperparameter Tuning with Renyi Differential Privacy", ICLR 2022, https://arxiv.org/abs/2110.03620.

Valid only where the number of runs and all that the others gave stay secret, and where the score is part of what one run
releases, or computed from that and public records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cotune.errors import PrivacyError
from cotune.privacy.accounting.filters import renyi_epsilon


def selection_epsilon(divergences: Mapping[float, float], mean: float, delta: float) -> float:
    """Return ε at δ of the best of a geometric number of runs, with `mean` runs in expectation.

    Theorem 2 of the paper with η = 1 and γ = 1/mean: at order λ the divergence is ε(λ) + log(mean)/(λ-1) + 2·min over λ' of
    ((1 - 1/λ')·ε(λ') + log(mean)/λ').

    Args:
        divergences: Order λ > 1 -> Rényi divergence of one run, the largest over all settings and organizations.
        mean: Expected number of runs, 1 or more.
        delta: δ.

    Raises:
        PrivacyError: For a mean below 1.
    """
    _check(mean)
    extra = 2 * min((1 - 1 / order) * value + math.log(mean) / order for order, value in divergences.items())
    return min(renyi_epsilon(value + math.log(mean) / (order - 1) + extra, order, delta) for order, value in divergences.items())


def draw_repetitions(mean: float, generator: np.random.Generator) -> int:
    """Draw the number of runs: 1 or more, geometric with this mean. The generator's state must be secret."""
    _check(mean)
    return int(generator.geometric(1 / mean))


def _check(mean: float) -> None:
    if not (math.isfinite(mean) and mean >= 1):
        raise PrivacyError(f"expected a mean number of runs of 1 or more, got {mean}", code="privacy.invalid_repetitions")
