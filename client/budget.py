"""How much noise an organisation adds, so that all rounds of a plan stay within its budget."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.models.errors import DataError, PrivacyError
from cotune.plan.schema import LocalTraining, Plan
from cotune.privacy.accounting import RecordPrivacy, Steps, calibrate, epsilon

__all__ = ["check_examples", "noise_multiplier", "planned_steps"]

_MOST_NOISE = 4.0  # times the calibrated σ; an update with more is nearly pure noise, and would only harm the model


def check_examples(examples: int, local: LocalTraining, organisation: str) -> None:
    """Raises DataError when the records do not fill a batch."""
    needed = local.batch_size if local.batch_size >= 1 else 1 / local.batch_size
    if examples < needed:
        raise DataError(
            f"{organisation} has {examples} examples, fewer than a batch needs ({needed:g} with local.batch_size ="
            f" {local.batch_size:g}): use fewer organisations, or another batch size"
        )


def planned_steps(plan: Plan, examples: int, first_round: int = 1) -> list[tuple[float, int]]:
    """(sample rate, steps) of every stage from a round on, for an organisation with `examples` records."""
    planned, last = [], 0
    for stage in plan.stages:
        rounds = min(stage.rounds, last + stage.rounds - first_round + 1)
        last += stage.rounds
        if rounds > 0:
            planned.append((stage.local.sample_rate(examples), rounds * stage.local.steps))
    return planned


def noise_multiplier(plan: Plan, privacy: RecordPrivacy, examples: int, round: int, spent: Sequence[Steps]) -> float:
    """σ for the rounds from `round` on: calibrated once for all steps of all rounds, and kept as long as it suffices.

    More than planned may have been spent: a crash in the middle of a round counts. Then the rest of the budget is spread over the
    remaining steps. Raises PrivacyError when there is no rest, or one so small that the update would be little but noise.
    """
    delta = privacy.delta_for(examples)
    sigma = calibrate(planned_steps(plan, examples), epsilon=privacy.epsilon, delta=delta)
    remaining = planned_steps(plan, examples, round)
    if epsilon([*spent, *(Steps(sigma, q, count) for q, count in remaining)], delta) <= privacy.epsilon:
        return sigma
    more = calibrate(remaining, epsilon=privacy.epsilon, delta=delta, spent=spent)
    if more > _MOST_NOISE * sigma:
        raise PrivacyError(
            f"interrupted rounds have used up nearly all of ε = {privacy.epsilon:g}: the rest would need {more / sigma:.0f} times"
            f" the planned noise, expected at most {_MOST_NOISE:g} times; leave the rest to the others, or allow more ε"
        )
    return more
