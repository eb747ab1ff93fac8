"""Runs whose updates travel in fewer bytes: through the same messages as between real organizations."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.simulations.run import Run, simulate
from tests.support.simulations import COMPARED, UNADAPTED, NewPlan, final_model, same

BASELINES = {"simulation": COMPARED, "personalize": UNADAPTED}


@pytest.fixture(scope="module")
def exact(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(toy_plan(**BASELINES), tmp_path_factory.mktemp("exact") / "run", device="cpu")


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "int4"])
def test_a_run_learns_as_well(toy_plan: NewPlan, tmp_path: Path, exact: Run, codec: str) -> None:
    run = simulate(toy_plan(wire=codec, simulation={"baselines": []}), tmp_path / "run", device="cpu")
    assert not same(final_model(run.folder), final_model(exact.folder))
    assert run.summary["test"]["federated"]["accuracy"] >= exact.summary["test"]["federated"]["accuracy"] - 0.05


def test_a_run_repeats_itself(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(wire="int4", rounds=2, simulation={"baselines": []})
    run = simulate(plan, tmp_path / "one", device="cpu")
    again = simulate(plan, tmp_path / "two", device="cpu")
    assert same(final_model(run.folder), final_model(again.folder))


def test_baselines_send_nothing_and_are_not_rounded(toy_plan: NewPlan, tmp_path: Path, exact: Run) -> None:
    run = simulate(toy_plan(wire="int4", **BASELINES), tmp_path / "run", device="cpu")
    wanted = exact.summary["test"]
    assert {name: run.summary["test"][name] for name in ("alone", "pooled")} == {n: wanted[n] for n in ("alone", "pooled")}


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn", "ties"])
def test_strategies_take_rounded_updates(toy_plan: NewPlan, tmp_path: Path, strategy: str) -> None:
    """Also those that keep state on both sides, which must be of what was sent."""
    plan = toy_plan(wire="int4", strategy=strategy, rounds=2, local={"momentum": 0.0}, simulation={"baselines": []})
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    assert all(len(entry["participants"]) == 2 for entry in summary["rounds"])


def test_smaller_ranks_and_private_rounds_are_admitted(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Under privacy the norm of an update is bounded, and rounding may lengthen it."""
    plan = toy_plan(
        wire="int4",
        train="lora",
        rounds=2,
        strategy="flexlora",
        lora={"rank": 2},
        privacy={"epsilon": 8.0},
        model={"pooling": "native"},
        local={"batch_size": 40, "learning_rate": 0.1},
        simulation={"ranks": [1, 2], "baselines": []},
    )
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    assert all(len(entry["participants"]) == 2 and not entry["quarantined"] for entry in summary["rounds"])
