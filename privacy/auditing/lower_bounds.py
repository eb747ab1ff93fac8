"""Lower bounds on ε, with a given confidence, from an attack on one training run.

Each of m targets was in or out by an independent fair coin, and an attack scored all of them from what was released. The
statistic is the number of correct ones among the surest guesses. Two theorems bound it for a mechanism that is as private as
claimed:

- *any mechanism*: theorem 5.2 of Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023. Assumes
  nothing but (ε, δ)-DP, and loses much for it. Computed by jax_privacy.
- *this mechanism*: Mahloujifar, Melis, Chaudhuri, "Auditing f-Differential Privacy in One Run", 2024,
  https://arxiv.org/abs/2410.22235. Tests the whole trade-off curve that the accountant claims for these very steps, and answers
  with the ε of the least noise that is refuted. jax_privacy has it for the curve of a single Gaussian only (the oracle of our
  tests), which is another curve when batches are sampled.

Not used, for they are no bounds here: Clopper-Pearson intervals, which need independent scores (those of a final
model are not; of an attacker who sees every step they are: see `stepwise`); fits of a Gaussian; and a correction for only those
thresholds that lie on the hull of the ROC curve, which was seen first.

The number of counted guesses is not chosen after seeing the answers: m, m/2, m/4, … are fixed, and the allowed error is divided
by the number of all tests (Bonferroni), so that all bounds of an audit hold *together* with the given confidence.

An attack on m targets without any mistakes gives the largest possible bound (`build_perfect_evidence`): for 2,000 targets about
10 by the second theorem, 4 by the first. A larger claimed ε cannot be refuted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import MIN_NOISE_MULTIPLIER, Steps, epsilon
from cotune.privacy.accounting.tradeoff import trade_off
from cotune.privacy.auditing.canaries import Coins

Array = np.ndarray[Any, np.dtype[np.float64]]
TradeOff = Callable[[float], float]  # see `tradeoff.trade_off`

_MIN_GUESSES = 16
_MOST_NOISE = 64.0  # times the claimed σ: a bound from still more noise is no bound worth printing


@dataclass(frozen=True)
class Guess:
    """The surest `count` guesses, of which `right` are right."""

    count: int
    right: int


@dataclass(frozen=True)
class Evidence:
    """What an attack found: guesses in fixed numbers about `targets` fair coins, and the area under its ROC curve.

    auc: of the curve itself, one half on average for an attack that knows nothing; that of its hull would be more.
    """

    targets: int
    guesses: tuple[Guess, ...]
    auc: float


def import_auditing() -> ModuleType:
    """jax_privacy's auditing. Raises PrivacyError where it is not installed."""
    try:
        from jax_privacy import auditing
    except ImportError as error:
        raise PrivacyError(
            f'an audit needs jax_privacy, which cannot be imported ({error}): install it by pip install "cotune[audit]"',
            code="privacy.audit_package_missing",
        ) from None
    found: ModuleType = auditing
    return found


def evidence(scores: Array, present: Coins, generator: np.random.Generator) -> Evidence:
    """Turn scores into guesses: "in" for the upper half, "out" for the lower half, surer the farther from the middle.

    Args:
        scores: (m,), larger for targets that are more likely to have been in.
        present: (m,), whether each target was in.
        generator: Orders equal scores at random.

    Raises:
        PrivacyError: If a score is not finite, or all targets were in, or all out.
    """
    if not np.isfinite(scores).all():
        raise PrivacyError(
            "a score of the audit is not finite: expected a finite model; lower local.learning_rate",
            code="privacy.audit_not_finite",
        )
    targets = len(scores)
    if targets < _MIN_GUESSES or present.all() or not present.any():
        raise PrivacyError(
            f"an audit of {targets} targets, {present.sum()} of them in, shows nothing: expected at least {_MIN_GUESSES}, some"
            " in and some out; use more canaries or records",
            code="privacy.audit_too_small",
        )
    rank = np.empty(targets)
    rank[np.lexsort((generator.random(targets), scores))] = np.arange(targets)
    away = rank - (targets - 1) / 2
    right = (away > 0) == present
    surest = np.argsort(-np.abs(away), kind="stable")
    guesses = tuple(Guess(count, int(right[surest[:count]].sum())) for count in _numbers(targets))
    return Evidence(targets, guesses, float(roc_auc_score(present, scores)))


def build_perfect_evidence(targets: int) -> Evidence:
    """Return the evidence of an error-free attack, which gives the largest possible lower bound for this number of targets."""
    return Evidence(targets, tuple(Guess(count, count) for count in _numbers(targets)), 1.0)


def _numbers(targets: int) -> list[int]:
    """Return the numbers of counted guesses: all, half of them, a quarter, …; fixed before anything is seen."""
    halvings = range(targets.bit_length())
    return [targets >> halving for halving in halvings if targets >> halving >= _MIN_GUESSES]


def lower_bound_any(found: Evidence, delta: float, error: float) -> float:
    """Return the largest ε for which (ε, δ)-DP is refuted, whatever the mechanism; at least 0.

    Args:
        found: The guesses.
        delta: δ.
        error: Largest probability with which the bound may exceed the true ε.
    """
    auditing = import_auditing()
    each = error / len(found.guesses)

    def bound(guess: Guess) -> float:
        """The library counts guesses of "in" that are right; right guesses of either kind obey the same theorem."""
        right = min(guess.right, found.targets - 1)  # it needs a wrong one: taking one for wrong only lowers the bound
        if not right:
            return 0.0
        scores = (np.arange(found.targets) < guess.count).astype(float)  # 1: guessed
        as_in = np.arange(found.targets) < right
        strategy = auditing.Explicit(threshold=0.5)
        auditor = auditing.CanaryScoreAuditor(scores[as_in], scores[~as_in])
        return float(auditor.epsilon_one_run(each, delta, threshold_strategy=strategy))

    return max(bound(guess) for guess in found.guesses)


def lower_bound_steps(found: Evidence, steps: Sequence[Steps], delta: float, error: float) -> float:
    """Return ε at δ of these steps with the smallest noise whose trade-off curve is refuted; at least 0.

    It exceeds the claimed ε exactly if the claimed curve itself is refuted. For a run with hardly any noise, the result is ε for
    σ = 0.3, or for the claimed σ if that is smaller, as the accountant does not support less.

    Args:
        found: The guesses.
        steps: As claimed.
        delta: δ.
        error: Largest probability with which the bound may exceed the true ε.
    """
    each = error / len(found.guesses)

    def refutes(curve: TradeOff) -> bool:
        return any(_is_refuted(curve, found.targets, guess, each) for guess in found.guesses)

    return find_least_refuted(steps, delta, refutes)


def find_least_refuted(steps: Sequence[Steps], delta: float, refutes: Callable[[TradeOff], bool]) -> float:
    """Return ε at δ of these steps with the least noise whose trade-off curve is refuted; 0 where none is.

    Args:
        refutes: Whether a curve is refuted. One above a refuted curve must be refuted too.

    Returns:
        A lower bound on ε, above the claim exactly when the claimed curve itself is refuted. Not below σ = 0.3, or the claimed σ
        where that is less: the accountant does not go there.
    """

    def scaled(scale: float) -> tuple[Steps, ...]:
        return tuple(replace(s, noise_multiplier=s.noise_multiplier * scale) for s in steps)

    def refuted(scale: float) -> bool:
        return refutes(_curve(scaled(scale)))

    low = min(1.0, MIN_NOISE_MULTIPLIER / min(s.noise_multiplier for s in steps))
    high = _MOST_NOISE
    if not refuted(high):
        return 0.0
    if refuted(1.0):
        high = 1.0
        if refuted(low):
            return epsilon(scaled(low), delta)
    else:
        low = 1.0
    while high / low > 1.002:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return epsilon(scaled(high), delta)


@lru_cache(maxsize=256)
def _curve(steps: tuple[Steps, ...]) -> TradeOff:
    """The trade-off curve of these steps. Kept, for the searches of all attacks begin at the same noise."""
    return trade_off(steps)


def _is_refuted(curve: TradeOff, targets: int, guess: Guess, error: float) -> bool:
    """Whether at least `guess.right` right guesses have a probability below `error` under the curve; k = 2 candidates each."""
    right = guess.right
    wrong = guess.count - guess.right
    r = error * right / targets
    h = error * wrong / targets
    for i in range(right - 1, -1, -1):
        farther = max(h, curve(1 - r))
        if farther == h:
            break
        r = min(r + i / (guess.count - i) * (farther - h), 1.0)
        h = farther
    return r + h > guess.count / targets
