"""Attack: choose the second plan after the first has answered.

The ledger composed the plans of years by PLD and stopped when that ε reached the limit. A privacy loss distribution composes
mechanisms that were fixed beforehand; as a stopping rule for mechanisms that are chosen one after the other, by what the earlier
ones gave away, it is not valid in general (https://arxiv.org/abs/2602.06756). A sum of Rényi divergences at one order is (Feldman &
Zrnic 2021): over several runs that decides now, and the books say so.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.errors import PolicyError
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.ledger.charges import Limit
from cotune.privacy.ledger.ledger import Ledger

LIMIT = Limit("budget.epsilon_total", 8.0, 1e-5)
FIRST = Steps(1.0, 0.05, 60)
ORDER = 4  # the best one for a Gaussian mechanism with ε = 8 at half of δ


def by_the_filter(spent: list[Steps]) -> float:
    """ε of the sum of the Rényi divergences at one order, by dp-accounting alone, at half of δ."""
    accountant = RdpAccountant(orders=[ORDER])
    for s in spent:
        accountant.compose(s.event())
    return float(accountant.get_epsilon(LIMIT.delta / 2))


def chosen_after(answer: int) -> Steps:
    """What a coordinator asks next: more or less noise, larger or smaller batches, as it likes."""
    return [Steps(0.9, 0.02, 30), Steps(1.5, 0.1, 20), Steps(6.0, 1.0, 2)][answer % 3]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def several(steps: Steps) -> Steps:
    """A round that is as expensive as four, so that a budget is spent in few."""
    return replace(steps, count=4 * steps.count)


def exhaust(ledger: Ledger, steps: Steps) -> None:
    """Spend what can be spent: in large rounds, and what these leave in such as are given."""
    numbers = iter(range(1, 200))
    for each in (several(steps), steps):
        with suppress(PolicyError):
            for number in numbers:
                ledger.reserve("second", number, each, limits=[LIMIT])
            raise AssertionError("nothing stopped the run")


@pytest.mark.parametrize("answer", [0, 1, 2])
def test_two_plans_stop_at_the_filter(ledger: Ledger, answer: int) -> None:
    ledger.reserve("first", 1, FIRST, limits=[LIMIT])
    steps = chosen_after(answer)
    exhaust(ledger, steps)
    spent = ledger.spent()
    assert by_the_filter(spent) <= LIMIT.epsilon < by_the_filter([*spent, steps])


def test_the_filter_stops_what_pld_would_let_through(ledger: Ledger) -> None:
    ledger.reserve("first", 1, FIRST, limits=[LIMIT])
    steps = chosen_after(1)
    exhaust(ledger, steps)
    assert epsilon([*ledger.spent(), steps], LIMIT.delta) < LIMIT.epsilon


def test_one_plan_that_is_fixed_beforehand_is_composed_by_pld(ledger: Ledger) -> None:
    """No answer chooses anything within a run. Half of δ is kept for the worlds in which a second run follows."""
    exhaust(ledger, FIRST)
    spent = ledger.spent()
    assert epsilon(spent, LIMIT.delta / 2) <= LIMIT.epsilon < epsilon([*spent, FIRST], LIMIT.delta / 2)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=3, max_size=7))
def test_whatever_is_asked_next_the_filter_holds(
    tmp_path_factory: pytest.TempPathFactory, answers: list[tuple[int, int]]
) -> None:
    """Rounds of several plans in any order: as soon as a second plan was charged, the sum stays within the budget."""
    ledger = Ledger(tmp_path_factory.mktemp("site") / "ledger.sqlite")
    for number, (plan, answer) in enumerate(answers, start=1):
        try:
            ledger.reserve(f"plan {plan}", number, several(chosen_after(answer)), limits=[LIMIT])
        except PolicyError:
            continue
    if len({c.plan_id for c in ledger.charges()}) > 1:
        assert by_the_filter(ledger.spent()) <= LIMIT.epsilon
