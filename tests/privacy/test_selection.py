from __future__ import annotations

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from cotune.models.errors import PrivacyError
from cotune.privacy.accounting import Steps
from cotune.privacy.filters import renyi
from cotune.privacy.selection import draw_repetitions, selection_epsilon

ORDERS = [1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64]


@pytest.mark.parametrize("mean", [1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("steps", [Steps(2.0, 1.0, 3), Steps(1.0, 0.1, 50)])
def test_it_is_the_epsilon_of_dp_accounting(steps: Steps, mean: float) -> None:
    orders = [order for order in ORDERS if steps.sample_rate == 1 or order == int(order)]
    accountant = RdpAccountant(orders=orders)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(steps.event(), mean, 1))
    found = selection_epsilon({order: renyi([steps], order) for order in orders}, mean, 1e-5)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


def test_repetitions_have_their_mean_and_are_never_none() -> None:
    generator = np.random.default_rng(0)
    drawn = [draw_repetitions(4.0, generator) for _ in range(20_000)]
    assert min(drawn) == 1
    assert np.mean(drawn) == pytest.approx(4.0, abs=0.12)
    assert draw_repetitions(1.0, generator) == 1


@pytest.mark.parametrize("mean", [0.5, float("nan"), float("inf")])
def test_a_mean_that_is_none(mean: float) -> None:
    with pytest.raises(PrivacyError, match="1 or more"):
        selection_epsilon({2.0: 0.1}, mean, 1e-5)
