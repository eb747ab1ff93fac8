"""Simulations on several processes: they find what one finds, whoever is killed, and nobody outlives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cotune.plan.plan import Plan
from cotune.simulations.run import Run, simulate
from tests.support.simulations import NewPlan, final_model, same, tensors_of


def history(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in run.summary["rounds"]]


def of_three(toy_plan: NewPlan, **changes: Any) -> Plan:
    """One organization more than there are workers."""
    simulation = {"clients": 3, "partition": "quantity:1.0", "min_examples": 10, "baselines": ["alone", "pooled"]}
    return toy_plan(rounds=2, strategy="scaffold", local={"momentum": 0.0}, simulation=simulation, **changes)


def test_workers_find_what_one_process_finds(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = of_three(toy_plan)
    one = simulate(plan, tmp_path / "one", device="cpu")
    two = simulate(plan, tmp_path / "two", device="cpu", workers=2)
    assert same(final_model(one.folder), final_model(two.folder))
    assert tensors_of(one.folder) == tensors_of(two.folder)
    assert history(one) == history(two)
    assert one.summary["test"] == two.summary["test"]
    assert one.summary["organizations"] == two.summary["organizations"]
    assert two.summary["peak_memory_bytes"] > 1.5 * one.summary["peak_memory_bytes"]
