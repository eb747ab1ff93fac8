from __future__ import annotations

from pathlib import Path

import pytest

from cotune.client.site import Site
from cotune.privacy.accounting import Steps, epsilon
from cotune.privacy.rounding import two_digits
from cotune.simulations.forecast import forecast
from cotune.simulations.simulate import simulate
from tests.simulations.conftest import NewPlan


def test_what_is_forecast_is_what_happens(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(
        train=[{"mode": "head", "rounds": 2}, {"mode": "full", "rounds": 1, "local": {"learning_rate": 0.01, "steps": 2}}],
        simulation={"clients": 3, "partition": "quantity:5.0", "min_examples": 30, "baselines": []},
    )
    seen, summary = forecast(plan, "cpu"), simulate(plan, tmp_path / "run", device="cpu").summary
    assert seen.plan.plan_id == summary["plan_id"]
    assert seen.test_examples == summary["test"]["examples"]
    assert [(o.name, o.examples, o.steps) for o in seen.organisations] == [
        (o["name"], o["examples"], o["steps"]) for o in summary["organisations"]
    ]
    assert [(s.mode, s.rounds) for s in seen.stages] == [("head", 2), ("full", 1)]
    assert seen.stages[-1].parameters == summary["model"]["shared_parameters"]
    played = {r["stage"]: r for r in summary["rounds"]}
    for stage in seen.stages:
        assert stage.bytes_up == pytest.approx(played[stage.mode]["bytes_up"], rel=0.01)
        assert played[stage.mode]["bytes_down"] == pytest.approx(stage.bytes_down, abs=3 * 400)  # a simulation names the sites


def test_what_a_term_sends_is_in_the_bytes_down(toy_plan: NewPlan) -> None:
    plain, twice = (
        forecast(toy_plan(strategy=strategy, train="full", local={"momentum": 0.0}), "cpu").stages[0]
        for strategy in ("fedavg", "scaffold")
    )
    assert twice.bytes_down - plain.bytes_down == pytest.approx(plain.bytes_up, rel=0.02)  # as large as the deltas
    assert twice.bytes_up == pytest.approx(plain.bytes_up, rel=0.01)


def test_sizes_by_hand(toy_plan: NewPlan) -> None:
    """A head for 3 classes on 16 features; LoRA of rank 2, A frozen: B of 16 × 2 in query and value of each of the layers."""
    stages = [{"mode": "head", "rounds": 1}, {"mode": "lora", "rounds": 1}]
    seen = forecast(toy_plan(train=stages, lora={"rank": 2}, model={"pooling": "native"}, local={"steps": 7}), "cpu")
    head, factors = 3 * 16 + 3, 2 * 2 * (16 * 2)
    pooler = 0  # of the encoder: not trained
    assert [s.parameters for s in seen.stages] == [head, head + factors + pooler]
    assert [s.steps for s in seen.stages] == [7, 7]
    for stage in seen.stages:
        assert 2 * 4 * stage.parameters < stage.bytes_up < 2 * (4 * stage.parameters + 300 * 12)
        assert 2 * 4 * stage.parameters < stage.bytes_down


def test_noise_and_epsilon_are_those_of_the_run(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(privacy={"epsilon": 3.0}, local={"batch_size": 40, "learning_rate": 1.0}, simulation={"baselines": []})
    seen, result = forecast(plan, "cpu"), simulate(plan, tmp_path / "run", device="cpu")
    for o in seen.organisations:
        declared = two_digits(o.examples)
        charged = Site(result.folder / "sites" / o.name).ledger().spent()
        assert {(c.noise_multiplier, c.sample_rate) for c in charged} == {(o.noise_multiplier, 40 / declared)}
        assert sum(c.count for c in charged) == o.steps == 15
        assert o.delta == pytest.approx(declared**-1.5)
        assert o.noise_multiplier is not None
        assert o.delta is not None
        assert o.epsilon_planned == epsilon([Steps(o.noise_multiplier, 40 / declared, 15)], o.delta)
        assert o.epsilon_planned <= o.epsilon_allowed == 3.0
        assert o.batch == pytest.approx(40)


def test_without_privacy_there_are_no_privacy_figures(toy_plan: NewPlan) -> None:
    for o in forecast(toy_plan(), "cpu").organisations:
        assert (o.noise_multiplier, o.epsilon_allowed, o.epsilon_planned, o.delta) == (None, None, None, None)


def test_a_forecast_writes_nothing_and_grows_with_the_work(
    toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = forecast(toy_plan(train="full", rounds=1), "cpu").seconds
    long = forecast(toy_plan(train="full", rounds=100), "cpu").seconds
    assert 0 < 20 * short < long < 500 * short
    assert list(tmp_path.iterdir()) == []
