"""A round of epochs: its steps, what they cost, and who declines it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cotune.client.noise_calibration import planned_steps
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import epsilon
from cotune.privacy.policy import DisclosureRules, Policy

MakePlan = Callable[..., Plan]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3}


@pytest.fixture
def of_epochs(make_plan: MakePlan) -> MakePlan:
    def make(**tables: Any) -> Plan:
        local = {"epochs": 1.5, "batch_size": 12, "physical_batch_size": 5, "learning_rate": 0.5}
        plan = make_plan(**tables)
        return Plan.model_validate({**plan.model_dump(mode="json"), "local": {**local, **tables.get("local", {})}})

    return make


@pytest.mark.parametrize("privacy", ["none", PRIVATE])
def test_the_steps_follow_from_the_records(
    of_epochs: MakePlan, make_site: Callable[..., Site], state_for: Callable[..., State], privacy: Any
) -> None:
    plan = of_epochs(privacy=privacy)
    state = state_for(plan)
    for name, rows, steps in (("all", range(60), 8), ("half", range(30), 4)):
        site = make_site(name, rows=rows)
        assert train_round(plan, site, 1, state).steps == steps
        assert [(rate, count) for rate, count in planned_steps(plan, len(rows))] == [(12 / len(rows), 3 * steps)]
        charged = [c.steps for c in site.ledger().charges()]
        if privacy != "none":
            assert [s.count for s in charged] == [steps]
            assert 0.97 * 2.0 < epsilon([s.__class__(s.noise_multiplier, s.sample_rate, 3 * steps) for s in charged], 1e-3) <= 2.0


@pytest.mark.parametrize(("declared", "batch", "steps"), [(60, 12, 8), (120, 12, 15), (60, 0.2, 8), (1000, 0.2, 8)])
def test_steps_follow_from_the_public_number(
    of_epochs: MakePlan,
    make_site: Callable[..., Site],
    state_for: Callable[..., State],
    declared: int,
    batch: float,
    steps: int,
) -> None:
    """Epochs over 60 records, of which the number of steps would tell how many there are."""
    policy = Policy.permissive().model_copy(
        update={"disclosures": DisclosureRules(example_count="declared", declared_examples=declared)}
    )
    plan = of_epochs(local={"batch_size": batch})
    site = make_site(policy=policy)
    assert train_round(plan, site, 1, state_for(plan)).steps == steps
