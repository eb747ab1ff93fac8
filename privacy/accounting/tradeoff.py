"""What (ε, δ) curves imply for attacks: trade-off curves, the share of members that an attack finds, the Gaussian μ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

from cotune.privacy.accounting.composition import Steps, deltas

if TYPE_CHECKING:
    from cotune.privacy.accounting.composition import Curve

_SMALLEST_DELTA = 1e-10  # of the privacy curve: below, the accountant's truncation of the tails is no longer negligible


def trade_off(spent: Iterable[Steps]) -> Callable[[float], float]:
    """Return the trade-off curve: α -> a lower bound on the type II error of any test at level α for one record's membership.

    Dong, Roth, Su, "Gaussian Differential Privacy", 2019, https://arxiv.org/abs/1905.02383, section 2.3: every (ε, δ) of the
    accountant is two lines below the curve.
    """
    import numpy as np

    epsilons = _supports()
    found = deltas(spent, epsilons.tolist())
    slopes = np.concatenate([-np.exp(epsilons), -np.exp(-epsilons)])
    heights = np.concatenate([1 - found, np.exp(-epsilons) * (1 - found)])
    return lambda alpha: max(0.0, float(np.max(heights + slopes * alpha)))


def true_positive_rate(spent: Iterable[Steps], false_positive_rate: float) -> float:
    """Return an upper bound on the true positive rate of any membership attack with this false positive rate.

    For one record in or out of these steps: 1 - f(false positive rate), with f the trade-off curve of the accountant (see
    `trade_off`). Without steps it is the false positive rate itself: guessing.

    Raises:
        ValueError: For a rate outside of [0, 1].
    """
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"expected a false positive rate in [0, 1], got {false_positive_rate}")
    charged = [s for s in spent if s.count]
    return 1 - trade_off(charged)(false_positive_rate) if charged else false_positive_rate


def gaussian_mu(spent: Iterable[Steps]) -> float:
    """Return the smallest μ for which distinguishing N(0, 1) from N(μ, 1) is no harder than one record's membership in these
    steps.

    "No harder" is checked at 301 values of ε from 0 to 60, as far as δ there is at least 1e-10: the Gaussian curve of μ, δ(ε) =
    Φ(μ/2 - ε/μ) - exp(ε)·Φ(-μ/2 - ε/μ), lies on or above that of the accountant, which is an upper bound itself (Dong, Roth, Su,
    "Gaussian Differential Privacy", 2019, corollary 2.13). So it is an upper bound on that range, and of a Gaussian mechanism
    without sampling it is √steps/σ. It says nothing about events rarer than 1e-10. 0 for no steps.
    """
    epsilons = _supports().tolist()
    found = deltas(spent, epsilons)
    mu = 0.0
    for eps, delta in zip(epsilons, found.tolist(), strict=True):
        if delta >= _SMALLEST_DELTA and gaussian_delta(mu, eps) < delta:
            mu = _mu_through(eps, min(delta, 1 - 1e-15), mu)
    return mu


def gaussian_delta(mu: float, eps: float) -> float:
    """Return δ(ε) of a Gaussian mechanism with a sensitivity of μ noise standard deviations (Balle & Wang, ICML 2018, theorem
    8)."""
    if mu == 0:
        return 0.0
    import numpy as np
    from scipy.special import log_ndtr

    return float(np.exp(log_ndtr(mu / 2 - eps / mu)) - np.exp(eps + log_ndtr(-mu / 2 - eps / mu)))


@cache
def _supports() -> Curve:
    """Where a trade-off curve is supported."""
    import numpy as np

    return np.concatenate([np.zeros(1), np.geomspace(1e-3, 60.0, 300)])


def _mu_through(eps: float, delta: float, low: float) -> float:
    """Return the μ > low whose Gaussian curve passes through (ε, δ)."""
    from scipy.optimize import brentq

    high = max(2 * low, 1.0)
    while gaussian_delta(high, eps) < delta:
        high *= 2
    return float(brentq(lambda mu: gaussian_delta(mu, eps) - delta, low, high, xtol=1e-12)) * (1 + 1e-9)
