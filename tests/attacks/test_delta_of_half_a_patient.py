"""Attack: δ = 1/n^1.1 lets the promise fail altogether for one patient in two data sets.

δ is the chance with which the bound of ε may not hold at all. With 1,200 records 1/n^1.1 is 4.1e-4, and n·δ = .49: publishing a
record in full with that chance, for every record, would have been within the promise. The default is 1/n^1.5 now, at which n·δ falls
with n, and a strict policy refuses δ > 1/(10·n).
"""

from __future__ import annotations

import pytest

from cotune.client.consent.policy_check import find_violations
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.claimed_guarantee import SMALL_DELTA, compute_figures
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.policy import Policy

SIZES = (100, 500, 1200, 20_000, 10**6)


def plan_with(delta: float | str) -> Plan:
    return parse_plan(
        {"labels": ["no", "yes"], "model": {"base": "nowhere"}, "data": {"source": "x.csv"}, "privacy": {"delta": delta}}
    )


def refused(delta: float | str, records: int) -> bool:
    """Whether a strict policy refuses a plan for its δ."""
    rules = {broken.rule for broken in find_violations(plan_with(delta), Policy(), records)}
    return bool(rules & {"budget.delta_times_records", "budget.delta_per_run"})


@pytest.mark.parametrize("records", SIZES)
def test_by_default_a_tenth_of_a_record_is_at_stake_at_most(records: int) -> None:
    assert RecordPrivacy().delta_for(records) * records <= 0.1
    assert not refused(RecordPrivacy().delta, records)


@pytest.mark.parametrize("records", SIZES)
def test_a_plan_with_the_former_delta_is_refused(records: int) -> None:
    assert refused("1/n^1.1", records)
    assert refused(0.2 / records, records)


def test_what_is_stated_is_stated_at_a_small_delta_too() -> None:
    spent = [Steps(1.8, 0.2, 200)]
    found = compute_figures(spent, 1e-4)
    assert SMALL_DELTA == 1e-6
    assert found.epsilon_at_small_delta > found.epsilon
    assert 0.01 < found.true_positive_rate < 1
    assert found.gaussian_mu > 0
