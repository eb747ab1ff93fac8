from __future__ import annotations

from dataclasses import replace

import pytest

from cotune.client.noise_calibration import Total
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.ledger.charges import History

PLANNED = (Steps(1.1, 0.2, 40), Steps(2.0, 1.0, 3))
PLAN = "plan"


def total(*spent: Steps, limit: float = 50.0, **others: tuple[Steps, ...]) -> Total:
    return Total(PLAN, limit, 1e-5, [History("", {PLAN: spent, **others})])


@pytest.mark.parametrize("done", [0, 7, 39])
def test_a_round_as_planned_is_within_the_plan(done: int) -> None:
    spent = [replace(PLANNED[0], count=done)]
    to_come = [replace(PLANNED[0], count=40 - done), PLANNED[1]]
    found = total(*spent)
    assert found.is_within(PLANNED, spent, to_come)
    assert epsilon([*spent, *to_come], 1e-5) <= epsilon(PLANNED, 1e-5)  # what it stands for
    assert found.after(to_come) <= found.epsilon


def test_a_step_more_than_planned_is_not_within_the_plan() -> None:
    assert not total(PLANNED[0]).is_within(PLANNED, [PLANNED[0]], [replace(PLANNED[0], count=1)])


def test_steps_of_another_noise_are_not_within_the_plan() -> None:
    assert not total().is_within(PLANNED, [], [replace(PLANNED[0], noise_multiplier=1.0, count=1)])


def test_another_run_takes_the_plan_out_of_the_shortcut() -> None:
    assert not total(other=(Steps(1.0, 0.1, 1),)).is_within(PLANNED, [], [PLANNED[0]])


def test_charges_that_the_run_does_not_know_count() -> None:
    """The history of a collection may hold more of the run than what counts for it."""
    assert not total(PLANNED[0]).is_within(PLANNED, [], [PLANNED[0]])


def test_a_plan_above_the_total_is_not_within_it() -> None:
    least = epsilon(PLANNED, 5e-6)
    assert total(limit=least).is_within(PLANNED, [], PLANNED)
    assert not total(limit=least * 0.999).is_within(PLANNED, [], PLANNED)
