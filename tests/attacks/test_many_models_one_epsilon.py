"""Figures of many models beside the ε of one.

`simulate` shows the federated model and what each organization reaches alone, trained on the same records: together they cost
ε = 12.05 where the report said 8.00. `compare` shows 15 runs of ε = 8 that compose to 45.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.client.site import Site
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.simulations.comparison.compare import compare
from cotune.simulations.comparison.grid import parse_variation
from cotune.simulations.joint_privacy_loss import compose_epsilon
from cotune.simulations.run import simulate
from tests.support.oracle_epsilon import oracle_epsilon
from tests.support.simulations import UNADAPTED, NewPlan, plan_file, toy_data, toy_plan

__all__ = ["plan_file", "toy_data", "toy_plan"]  # fixtures


def test_a_simulation_states_the_epsilon_of_all_its_models(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(privacy={"epsilon": 8.0}, rounds=2, simulation={"baselines": ["alone"]}, personalize=UNADAPTED)
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    for each in summary["organizations"]:
        sites = (f"sites/{each['name']}", f"baselines/alone/{each['name']}/site")
        steps = [s for site in sites for s in Site(tmp_path / "run" / site).ledger().spent()]
        assert each["epsilon_spent"] <= 8.0 < each["epsilon_all_models"]
        assert each["epsilon_all_models"] == pytest.approx(oracle_epsilon(steps, each["delta"]), abs=0.02)
    claim = summary["privacy"]["claim"]
    assert summary["privacy"]["epsilon_all_models"] == max(each["epsilon_all_models"] for each in summary["organizations"])
    assert claim["figures"]["epsilon"] == max(each["epsilon_spent"] for each in summary["organizations"])
    assert any("label counts" in text for text in claim["not_covered"])


def test_a_comparison_states_the_epsilon_of_all_runs(plan_file: Path, tmp_path: Path) -> None:
    varied = [parse_variation("strategy.weighting=examples,uniform")]
    found = compare(plan_file, varied, seeds=2, overrides=["privacy={epsilon=8}"], out=tmp_path / "out", jobs=1, device="cpu")
    written = json.loads((tmp_path / "out" / "results.json").read_bytes())
    assert found.epsilon_together is not None
    assert found.epsilon_together > 2 * 8
    assert written["epsilon_together"] == found.epsilon_together


def test_comparison_with_a_nonprivate_run_has_no_epsilon(plan_file: Path, tmp_path: Path) -> None:
    varied = [parse_variation('privacy="none",{epsilon=8}')]
    found = compare(plan_file, varied, seeds=1, out=tmp_path / "out", jobs=1, device="cpu")
    assert found.private
    assert found.epsilon_together is None


def test_runs_of_equal_organizations_compose_like_one_list() -> None:
    steps = [Steps(1.0, 0.1, 50)]
    delta = 1e-5
    together = compose_epsilon([[steps, steps]] * 6, delta)
    assert epsilon(steps * 6, delta) <= together <= 1.3 * epsilon(steps * 6, delta)


def test_record_may_be_at_the_organization_that_spends_most() -> None:
    little = [Steps(4.0, 0.1, 10)]
    much = [Steps(1.0, 0.1, 50)]
    delta = 1e-5
    assert compose_epsilon([[little, much], [much, little]], delta) == compose_epsilon([[much], [much]], delta)
    assert compose_epsilon([], delta) == 0
