"""How long an update can be that was trained as the plan says: what is longer was made up, or went wrong.

Under DP-SGD a step's gradient is (Σ clipped + σC·N(0, I)) / B. An optimizer of SGD answers an impulse in step t by h_t, so that

    ‖Δ‖ ≤ Σ_t |h_t| · C · |batch| / B  +  σC/B · √(Σ_t h_t²) · ‖N(0, I_d)‖  +  |a − 1| · ‖θ‖

with a, what weight decay leaves of θ. Adam divides by what it sees: its step is bounded whatever the gradient, by Cauchy-Schwarz
over its two running means (Kingma & Ba, ICLR 2015, section 2.1, bound the stationary case). Without privacy nothing bounds what
SGD sends, and a client term adds to the gradients, as do `base_decay` and the pull of pFedMe, which the bound does not know: then
none follows, and only the round's other updates tell.

An update is rounded onto the values of the plan's codec, which can lengthen it: what arrives is bounded, so that the bound grows
by as much (`wire.compute_growth`). `server.max_update_norm` is of what arrives, and is taken as it stands.

The server computes the bound for whatever number an organization declares, so that the work must not grow with that number: from
some step on each counts for the most that any can be, and σ is that of fewer records, which is no smaller.
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

_UNDERSTATED = 2.0  # times as many records in a batch as the declared number expects: a site is warned beyond that
_OWN_BUDGET = 10.0  # times the plan's noise: of organizations that spend less than it allows
_TAIL = math.sqrt(2 * math.log(1e12))  # ‖N(0, I_d)‖ is above √d + this with a probability below 1e-12 (Gaussian concentration)
_SLACK = 1.01  # float32
_BETAS = (0.9, 0.999)  # torch's defaults of Adam
_MAX_BOUND = 1e12  # beyond that it is no bound
_FOLLOWED = 100_000  # steps that are followed one by one, as many as `local.steps` can be; epochs over many records make more
_SMALLEST_RATE = 1e-3  # of a batch among the records: the noise for a smaller one is no larger, and takes minutes to compute


def bound_update_norm(plan: Plan, stage: Stage, *, examples: int, entries: int, start: float) -> float | None:
    """Return a bound on ‖Δ‖₂, as it arrives; None where none follows. Honest updates exceed it with a probability below 1e-12.

    Args:
        examples: The declared number N of units, from which batch and noise follow; it is rounded down to two digits.
        entries: d, parameters that are trained.
        start: ‖θ‖₂ of these as they are received.
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
    """Return how far the clipped gradients of SGD alone can go, Σ|h_t|·C·|batch|/B; None where they are not bounded."""
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
    """What SGD makes of an impulse in each of T steps: bounds on Σ|h_t|, on Σh_t², and on |a − 1|.

    They are exact up to `_FOLLOWED` steps. Every later step counts for the longest h so far, or for rate / (1 − momentum), to
    which h grows without weight decay; with it, θ is taken to be gone.
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
    """At least σ, as it follows from the plan for so many records; None where no noise reaches the plan's ε.

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
