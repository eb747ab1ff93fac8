"""The noise of a run follows from the noised number of records, and was composed with it as if it had been fixed before.

Where the number N comes out small it speaks for the world without the record, and there δ = 1/N^1.5 is larger and the noise less.
With a Gaussian draw of σ = 20 that was composed by PLD, and one step of all records, the probability with which ε = 1 fails was
1.12 times the δ that was promised, averaged over N, at 80 records, 1.08 times at 150, 1.02 times at 1,000. Now the draw is ε₁-private by itself, and what
follows is calibrated to ε - ε₁: whatever N decides, the promise holds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cotune.client.noise_calibration import get_budget, noise_multiplier, planned_disclosures, planned_steps
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, deltas
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.geometric import geometric_epsilon
from cotune.privacy.policy import DisclosureRules, Policy

EPSILON = 1.0
SIGMA = 20.0


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(privacy={"epsilon": EPSILON, "delta": "1/n^1.5"}, local={"batch_size": 0.9, "steps": 1}, rounds=1)


def promised_and_true(plan: Plan, records: int) -> tuple[float, float]:
    """δ as promised, and P(loss > ε) as it is in the joint distribution of N and what follows: the worse of both directions."""
    policy = Policy.permissive().model_copy(
        update={"disclosures": DisclosureRules(example_count="noised", noise_multiplier=SIGMA)}
    )
    assert isinstance(plan.privacy, RecordPrivacy)
    assert [steps.mechanism for steps in planned_disclosures(plan, policy)] == ["geometric"]
    loss = geometric_epsilon(SIGMA)
    drawn = np.arange(records - 60, records + 61, 30)
    likely = np.exp(-loss * np.abs(drawn - records))
    likely /= likely.sum()
    promised = 0.0
    true = np.zeros(2)
    for number, share in zip(drawn.tolist(), likely.tolist(), strict=True):
        budget = get_budget(plan.privacy, policy, number)
        sigma = noise_multiplier(plan, policy, budget, number, 1)
        training = [Steps(sigma, rate, count) for rate, count in planned_steps(plan, number)]
        told = loss if number >= records else -loss
        promised += share * budget.delta
        true += share * deltas(training, [EPSILON - told, EPSILON + told])
    return promised, float(true.max())


def test_the_promise_holds_whatever_the_number_decides(plan: Plan) -> None:
    promised, true = promised_and_true(plan, 90)
    assert 0.5 * promised < true <= promised
