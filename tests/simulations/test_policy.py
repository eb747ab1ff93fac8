"""Organizations with a mind of their own: one declines and the others go on; each spends what it wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.client.site import Site
from cotune.privacy.accounting.composition import epsilon
from cotune.server.runs.events import observe_run, read_events
from cotune.simulations.forecast.forecast import forecast
from cotune.simulations.run import simulate
from tests.support.failures import fails_with
from tests.support.simulations import UNADAPTED, NewPlan


def test_one_declines_and_the_others_go_on(toy_plan: NewPlan, tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = toy_plan(privacy={"epsilon": 4.0}, simulation={"clients": 3, "baselines": []})

    def strict(event: str, fields: dict[str, Any]) -> None:
        if event == "run_started":
            (run / "sites" / "org-2" / "policy.toml").write_text("[training]\nmin_examples = 0\nmin_batch = 0\n")

    with observe_run(strict):
        result = simulate(plan, run, device="cpu")
    assert len(result.summary["rounds"]) == 3
    for entry in result.summary["rounds"]:
        assert entry["participants"] == ["org-1", "org-3"]
        [dropped] = entry["dropped"]
        assert dropped["organization"] == "org-2"
        assert dropped["reason"].startswith("declined by the rule training.base_models")
    told = [e["reason"] for e in read_events(run / "events.jsonl") if e["event"] == "update_dropped"]
    assert all(reason.startswith("declined") for reason in told)
    assert Site(run / "sites" / "org-2").ledger().charges() == []
    assert result.summary["organizations"][1]["epsilon_spent"] == 0


def test_each_organization_spends_what_it_wants(toy_plan: NewPlan, tmp_path: Path) -> None:
    own = [0.5, 4.0, 9.0]
    simulation = {"clients": 3, "baselines": ["alone"], "epsilons": own}
    plan = toy_plan(privacy={"epsilon": 4.0}, simulation=simulation, personalize=UNADAPTED)
    planned = [o.epsilon_planned for o in forecast(plan, "cpu").organizations]
    result = simulate(plan, tmp_path / "run", device="cpu")
    for number, (allowed, foreseen) in enumerate(zip([0.5, 4.0, 4.0], planned, strict=True), start=1):
        organization = result.summary["organizations"][number - 1]
        assert organization["epsilon_allowed"] == allowed
        assert 0.95 * allowed < organization["epsilon_spent"] <= allowed
        assert foreseen == pytest.approx(organization["epsilon_spent"])
        alone = Site(tmp_path / "run" / "baselines" / "alone" / f"org-{number}" / "site")
        assert epsilon(alone.ledger().spent(), organization["delta"]) <= allowed  # the comparison is under the same privacy


def test_every_organization_needs_an_epsilon_of_its_own(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(privacy={"epsilon": 4.0}, simulation={"clients": 3, "epsilons": [1.0]})
    with fails_with("plan.values_per_organization", "1", "simulation.epsilons", "3"):
        simulate(plan, tmp_path / "run", device="cpu")
