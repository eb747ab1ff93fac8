"""Steps of all records: nothing is drawn, so that nothing is amplified, and the Gaussian mechanism alone is charged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from cotune.client.site import Site
from cotune.privacy.mechanisms.geometric import geometric_epsilon
from cotune.simulations.run import simulate
from tests.support.simulations import NewPlan

EPSILON = 3.0
ROUNDS = 4
STEPS = 2


def test_full_batches_are_charged_as_gaussian_steps(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Every number in the ledger is checked against dp-accounting, given the events of a Gaussian mechanism alone."""
    local = {"batch_size": "all", "steps": STEPS, "learning_rate": 1.0, "schedule": "linear"}
    plan = toy_plan(
        rounds=ROUNDS, privacy={"epsilon": EPSILON}, local=local, simulation={"baselines": [], "partition": "quantity:2.0"}
    )
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    for organization in summary["organizations"]:
        assert (organization["sample_rate"], organization["steps"]) == (1.0, ROUNDS * STEPS)
        site = Site(tmp_path / "run" / "sites" / organization["name"])
        charges = site.ledger().charges()
        charged_steps = [charge.steps for charge in charges if charge.purpose == "training"]
        assert [(s.name, s.count) for s in charged_steps] == [("gaussian", STEPS)] * ROUNDS
        (sigma,) = {s.noise_multiplier for s in charged_steps}
        accountant = PLDAccountant(value_discretization_interval=1e-4)
        accountant.compose(dp_event.GaussianDpEvent(sigma), ROUNDS * STEPS)
        told = [charge.steps for charge in charges if charge.purpose != "training"]
        pure = sum(geometric_epsilon(s.noise_multiplier) for s in told)
        delta = organization["delta"]
        assert organization["epsilon_spent"] == pytest.approx(pure + accountant.get_epsilon(delta), rel=2e-3)
        assert organization["epsilon_spent"] <= EPSILON
        assert math.isclose(organization["epsilon_spent"], EPSILON, rel_tol=0.02)
