"""Bound the norm of an update that was trained according to the plan; a longer one is fabricated or faulty.

Under DP-SGD a step's gradient is (Σ clipped + σC·N(0, I)) / B. With h_t, the impulse response of SGD to the gradient of step t,

    ‖Δ‖ ≤ Σ_t |h_t| · C · |batch| / B  +  σC/B · √(Σ_t h_t²) · ‖N(0, I_d)‖  +  |a − 1| · ‖θ‖

where a is the factor of θ that weight decay leaves. Adam normalizes its gradients, so that its step is bounded whatever the
gradient, by Cauchy-Schwarz over its two running means (Kingma & Ba, ICLR 2015, section 2.1, bound the stationary case). There is
no bound for SGD without privacy, nor with a client term, `base_decay` or pFedMe, which add unknown terms to the gradients; then
an update can only be compared with the others of its round.

Rounding to the values of the plan's codec can increase the norm. The bound is on the rounded update as received, and so includes
that growth (`wire.compute_growth`). `server.max_update_norm` is a bound on the received update, too, and is used unchanged.

The server computes the bound for any number of records that an organization declares, so the effort must not grow with that
number: beyond a number of steps, each counts with the upper bound of all, and σ is that of fewer records, which is no smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cotune.errors import PrivacyError
from cotune.plan.local_training import LocalTraining, Stage
from cotune.plan.plan import Plan
from cotune.plan.wire import compute_growth
from cotune.privacy.accounting.composition import MAX_NOISE_MULTIPLIER, calibrate
from cotune.privacy.accounting.display_rounding import round_to_two_digits
from cotune.privacy.config import RecordPrivacy, compute_delta

_UNDERSTATED = 2.0  # ratio of the actual to the expected batch that is tolerated; beyond it, a site is warned
_OWN_BUDGET = 10.0  # ratio to the plan's noise that is tolerated, for organizations that spend less than it allows
_TAIL = math.sqrt(2 * math.log(1e12))  # ‖N(0, I_d)‖ is above √d + this with a probability below 1e-12 (Gaussian concentration)
_SLACK = 1.01  # for rounding in float32
_BETAS = (0.9, 0.999)  # torch's defaults for Adam
_MAX_BOUND = 1e12  # a larger bound is useless
_FOLLOWED = 100_000  # steps computed one by one, the maximum of `local.steps`; epochs over many records give more steps
_SMALLEST_RATE = 1e-3  # the sample rate for which noise is computed; for a smaller one it is no larger, and takes minutes


def bound_update_norm(plan: Plan, stage: Stage, *, examples: int, entries: int, start: float) -> float | None:
    """Return a bound on ‖Δ‖₂ of a received update, which honest ones exceed with a probability below 1e-12.

    Args:
        plan: The plan.
        stage: Of the round.
        examples: The declared number N of units, which determines batch and noise; it is rounded down to two digits.
        entries: d, the number of trained parameters.
        start: ‖θ‖₂ of these parameters at the start of the round.

    Returns:
        The bound; None if there is none.
    """
    if plan.server.max_update_norm is not None:
        return plan.server.max_update_norm
    if plan.shares_predictions:
        return _SLACK * (plan.public.bound * math.sqrt(entries) + start) * compute_growth(plan.wire)
    trained = _bound_norm(plan, stage, round_to_two_digits(max(1, examples)), entries, start)
    found = None if trained is None else trained * compute_growth(plan.wire)
    return found if found is not None and found <= _MAX_BOUND else None


def _bound_norm(plan: Plan, stage: Stage, examples: int, entries: int, start: float) -> float | None:
    local = stage.local
    if local.optimizer != "sgd":
        steps = local.steps_per_round(examples)
        decayed = 1 - (1 - min(1.0, _rate(local) * local.weight_decay)) ** steps if local.optimizer == "adamw" else 0.0
        factors = _adam_factors(steps)
        longest = sum(factors) + (steps - len(factors)) * _largest_adam_factor()
        return _SLACK * (_rate(local) * longest * math.sqrt(entries) + decayed * start)
    by_gradients = bound_norm_by_gradients(plan, stage, examples)
    if by_gradients is None or not isinstance(plan.privacy, RecordPrivacy):
        return None
    noise = _noise(plan, plan.privacy, examples)
    if noise is None:
        return None
    moved = _Impulses.of(local, local.steps_per_round(examples))
    batch = local.sample_rate(examples) * examples  # B
    spread = _OWN_BUDGET * noise * plan.privacy.clip_norm / batch * math.sqrt(moved.squares)
    return _SLACK * (by_gradients + spread * (math.sqrt(entries) + _TAIL) + moved.decayed * start)


def bound_norm_by_gradients(plan: Plan, stage: Stage, examples: int) -> float | None:
    """Return the bound on how far the clipped gradients of SGD move the model without noise: Σ|h_t|·C·|batch|/B.

    Args:
        plan: The plan.
        stage: Of the round.
        examples: Number of units.

    Returns:
        The bound; None if there is none.
    """
    local = stage.local
    if not isinstance(plan.privacy, RecordPrivacy) or local.optimizer != "sgd":
        return None
    if plan.strategy.client_term is not None or local.base_decay or plan.personal.method == "pfedme":
        return None
    return _UNDERSTATED * plan.privacy.clip_norm * _Impulses.of(local, local.steps_per_round(examples)).lengths


def _rate(local: LocalTraining) -> float:
    return max(local.learning_rate, local.head_learning_rate or 0.0)


@dataclass(frozen=True)
class _Impulses:
    """Bounds on the impulse responses of SGD over T steps: on Σ|h_t|, on Σh_t², and on |a − 1|.

    They are exact up to `_FOLLOWED` steps. Every later step counts with the largest h so far, or with rate / (1 − momentum), to
    which h grows without weight decay; with weight decay, θ is assumed to have decayed completely.
    """

    lengths: float
    squares: float
    decayed: float

    @classmethod
    def of(cls, local: LocalTraining, steps: int) -> _Impulses:
        """Return those of `steps` steps; infinite where an impulse grows beyond all bounds."""
        followed = min(steps, _FOLLOWED)
        responses, kept = _responses(local, followed)
        later = steps - followed
        longest = max(max(map(abs, responses)), _rate(local) / (1 - local.momentum)) if later else 0.0
        return cls(
            sum(map(abs, responses)) + later * longest,
            sum(h * h for h in responses) + later * longest**2,
            max(abs(kept - 1), 1.0) if later and local.weight_decay else abs(kept - 1),
        )


def _responses(local: LocalTraining, steps: int) -> tuple[list[float], float]:
    """(h_1 … h_T, a): how far an impulse in each step has moved the parameter after step T, and what is left of θ itself."""
    rate = _rate(local)
    impulses = list[float]()
    position = 0.0
    velocity = 0.0
    kept = 1.0
    speed = 0.0
    for step in range(steps):
        velocity = local.momentum * velocity + (1.0 if step == 0 else 0.0) + local.weight_decay * position
        position -= rate * velocity
        impulses.append(position)
        speed = local.momentum * speed + local.weight_decay * kept
        kept -= rate * speed
        if not abs(position) <= _MAX_BOUND:
            return [math.inf], 1.0
    return impulses, kept


def _adam_factors(steps: int) -> list[float]:
    """How many learning rates step t moves a coordinate at most: |m̂_t| / √v̂_t over all gradients; those that are followed."""
    first, second = _BETAS
    ratio = first**2 / second
    found = list[float]()
    series = 0.0
    for step in range(1, min(steps, _FOLLOWED) + 1):
        series += ratio ** (step - 1)
        corrected = math.sqrt(1 - second**step) / (1 - first**step)
        found.append((1 - first) / math.sqrt(1 - second) * math.sqrt(series) * corrected)
    return found


def _largest_adam_factor() -> float:
    """What the factors of ever later steps grow to."""
    first, second = _BETAS
    return (1 - first) / math.sqrt((1 - second) * (1 - first**2 / second))


def _noise(plan: Plan, privacy: RecordPrivacy, examples: int) -> float | None:
    """At least σ, as it follows from the plan for `examples` records; None where no noise reaches the plan's ε.

    A batch is a smaller part of more records, which takes less noise: σ is that of a rate of `_SMALLEST_RATE` at least, at the δ
    of all records.
    """
    planned = []
    is_smaller = False
    for stage in plan.stages:
        rate = stage.local.sample_rate(examples)
        counted = examples if rate >= _SMALLEST_RATE else max(1, math.floor(rate * examples / _SMALLEST_RATE))
        is_smaller |= counted < examples
        planned.append((stage.local.sample_rate(counted), stage.rounds * plan.charged_steps(stage, counted)))
    found = _calibrated(tuple(planned), privacy.epsilon, compute_delta(privacy.delta, examples))
    return MAX_NOISE_MULTIPLIER if found is None and is_smaller else found


@lru_cache(maxsize=256)
def _calibrated(planned: Sequence[tuple[float, int]], epsilon: float, delta: float) -> float | None:
    try:
        return calibrate(planned, epsilon=epsilon, delta=delta)
    except (PrivacyError, ValueError, OverflowError):
        return None
