"""A tight audit: lower bounds on ε from an attacker who sees every step and knows the direction of the target's gradient.

Nasr, Hayes, Steinke, Balle, Tramèr, Jagielski, Carlini, Terzis, "Tight Auditing of Differentially Private Machine Learning",
USENIX Security 2023, section 4 (white-box access): the attacker sees the noised sum of every step and knows the direction of
the target's gradient. For a canary that owns a coordinate the score is the logarithm of the likelihood ratio of "in" to
"out", the most powerful test there is (Neyman and Pearson). So the trade-off curve that is claimed is reached, and not merely
bounded.

Why Clopper-Pearson intervals hold here, and not for the scores of one final model (`audit`): canaries lie in coordinates of
their own, in which no record and no other canary has a gradient. Of canary j is seen, over the steps t, x_tj = b_tj·coin_j +
σ·z_tj, where coins, samples b and noise z are all independent of each other. Under the claimed mechanism the scores of the
canaries are therefore independent, and whether each is above a threshold is a coin of its own: a correct engine is accused
with at most the stated probability. For an engine that is wrong, the number is a lower bound as far as its scores are
independent too.

Two kinds of tests, whose allowed errors add up. The share of right guesses "in, when the score is above 0": every target is
guessed rightly with a probability of at most (1 + advantage)/2, so their number is below a binomial variable. And both error
rates at thresholds that the claim fixes before anything is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.auditing.canaries import Coins
from cotune.privacy.auditing.lower_bounds import Array, TradeOff, find_least_refuted

_THRESHOLDS = 9


@dataclass(frozen=True)
class Errors:
    """Of the test "in, when the score is above a threshold"."""

    false_alarms: int  # of those that were out
    misses: int  # of those that were in


@dataclass(frozen=True)
class Separation:
    """How well the scores of `members` targets that were in and `others` that were out are told apart, at fixed thresholds.

    Attributes:
        auc: Area under the curve of all thresholds.
    """

    members: int
    others: int
    errors: tuple[Errors, ...]
    auc: float


def log_likelihood_ratios(sums: Array, noise_multiplier: float, sample_rate: float) -> Array:
    """Return log p(x | in)/p(x | out) for one step of the sampled Gaussian mechanism; over several steps they add up.

    Args:
        sums: x, the noised sums in the targets' directions, in units of the clip norm C: N(0, σ²) when out, and when in
            (1 − q)·N(0, σ²) + q·N(1, σ²).
        noise_multiplier: σ.
        sample_rate: q in (0, 1].
    """
    exponent: Array = (sums - 0.5) / noise_multiplier**2
    if sample_rate >= 1:
        return exponent
    return np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + exponent)


def separation(scores: Array, present: Coins, claim: float) -> Separation:
    """Count the errors at fixed thresholds, the likelihood ratios e^0 … e^ε of the claimed ε.

    Args:
        scores: (m,), sums of `log_likelihood_ratios`.
        present: (m,), the coins.
        claim: The claimed ε.

    Raises:
        PrivacyError: For scores that are not finite, and for coins that all fell alike.
    """
    if not np.isfinite(scores).all():
        raise PrivacyError(
            "a score of the audit is not finite: expected a finite model; lower local.learning_rate",
            code="privacy.audit_not_finite",
        )
    if present.all() or not present.any():
        raise PrivacyError(
            f"all {len(present)} coins of the audit fell alike: expected some in and some out; use more canaries",
            code="privacy.audit_too_small",
        )
    errors = []
    for threshold in np.linspace(0.0, claim, _THRESHOLDS):
        above = scores > threshold
        errors.append(Errors(int((above & ~present).sum()), int((~above & present).sum())))
    members = int(present.sum())
    return Separation(members, len(present) - members, tuple(errors), float(roc_auc_score(present, scores)))


def perfect(found: Separation) -> Separation:
    """Return what an attack without a mistake would have found about the same targets: nothing can show more."""
    return Separation(found.members, found.others, (Errors(0, 0),) * len(found.errors), 1.0)


def lower_bound_any(found: Separation, delta: float, error: float) -> float:
    """Return the largest ε for which (ε, δ)-DP is refuted, whatever the mechanism; at least 0.

    Kairouz, Oh, Viswanath, "The Composition Theorem for Differential Privacy", ICML 2015, section 2.1: α + e^ε·β ≥ 1 − δ, and the
    same with α and β exchanged; so 1 − α − β ≤ (e^ε − 1 + 2δ)/(e^ε + 1).

    Args:
        error: The probability, at most, with which the bound is above the true ε.
    """
    right = _right_at_least(found, error / 2)
    ratios = [(right - delta) / (1 - right)] if right < 1 else []
    for alpha, missed in _error_rates(found, error / 2):
        ratios += [(1 - delta - alpha) / missed, (1 - delta - missed) / alpha]
    return math.log(max(1.0, *ratios))


def lower_bound_steps(found: Separation, steps: Sequence[Steps], delta: float, error: float) -> float:
    """Return ε at δ of these steps with the least noise that is refuted: the claim's own trade-off curves; at least 0.

    Args:
        error: As in `lower_bound_any`.
    """
    return find_least_refuted(steps, delta, lambda curve: refutes(found, curve, error))


def refutes(found: Separation, curve: TradeOff, error: float) -> bool:
    """Return whether an attack refutes a claimed trade-off curve.

    Args:
        found: Result of the attack.
        curve: The claimed trade-off curve.
        error: Largest probability of an attack this good if the claim holds.
    """
    if _right_at_least(found, error / 2) > (1 + _advantage(curve)) / 2:
        return True
    return any(curve(alpha) > missed for alpha, missed in _error_rates(found, error / 2))


def _advantage(curve: TradeOff) -> float:
    """An upper bound on 1 − α − β of any test. The curve is its own inverse: α + β is least where both are equal."""
    low = 0.0
    high = 0.5
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if curve(middle) >= middle else (low, middle)
    return 1 - 2 * low


def _right_at_least(found: Separation, error: float) -> float:
    """A lower bound, by Clopper and Pearson, on the probability of a right guess at the first threshold, 0."""
    targets = found.members + found.others
    right = targets - found.errors[0].false_alarms - found.errors[0].misses
    return float(beta.ppf(error, right, targets - right + 1)) if right else 0.0


def _error_rates(found: Separation, error: float) -> list[tuple[float, float]]:
    """Upper bounds (α, β) on both error rates at each threshold, by Clopper and Pearson; all hold together."""
    each = error / (2 * len(found.errors))

    def at_most(count: int, trials: int) -> float:
        return float(beta.ppf(1 - each, count + 1, trials - count)) if count < trials else 1.0

    return [(at_most(e.false_alarms, found.others), at_most(e.misses, found.members)) for e in found.errors]
