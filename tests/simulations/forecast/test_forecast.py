from __future__ import annotations

from pathlib import Path

import pytest

from cotune.client.consent.policy_check import check_consent, find_violations
from cotune.client.noise_calibration import planned_disclosures
from cotune.client.site import Site
from cotune.errors import PlanError, PolicyError
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.display_rounding import round_to_two_digits
from cotune.privacy.policy import BudgetRules, Policy
from cotune.simulations.forecast.forecast import forecast, forecast_for
from cotune.simulations.forecast.members import parse_examples
from cotune.simulations.run import simulate
from tests.support.simulations import NewPlan


@pytest.mark.parametrize("codec", ["float32", "int4"])
def test_what_is_forecast_is_what_happens(toy_plan: NewPlan, tmp_path: Path, codec: str) -> None:
    plan = toy_plan(
        wire=codec,
        train=[{"mode": "head", "rounds": 2}, {"mode": "full", "rounds": 1, "local": {"learning_rate": 0.01, "steps": 2}}],
        simulation={"clients": 3, "partition": "quantity:5.0", "min_examples": 30, "baselines": []},
    )
    seen = forecast(plan, "cpu")
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    assert seen.plan.plan_id == summary["plan_id"]
    assert seen.test_examples == summary["test"]["examples"]
    assert [(o.name, o.examples, o.steps) for o in seen.organizations] == [
        (o["name"], o["examples"], o["steps"]) for o in summary["organizations"]
    ]
    assert [(s.mode, s.rounds) for s in seen.stages] == [("head", 2), ("full", 1)]
    assert seen.stages[-1].parameters == summary["model"]["shared_parameters"]
    played = {r["stage"]: r for r in summary["rounds"]}
    for stage in seen.stages:
        assert stage.bytes_up == pytest.approx(played[stage.mode]["bytes_up"], rel=0.01)
        assert played[stage.mode]["bytes_down"] == pytest.approx(stage.bytes_down, abs=3 * 400)  # a simulation names the sites


def test_changes_are_forecast_for_the_rounds_after_the_first(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(wire_down="int4", rounds=3)
    first, *later = simulate(plan, tmp_path / "run", device="cpu").summary["rounds"]
    [stage] = forecast(plan, "cpu").stages
    assert [entry["bytes_down"] for entry in later] == [pytest.approx(stage.bytes_down, abs=2 * 400)] * 2
    assert first["bytes_down"] == pytest.approx(forecast(toy_plan(rounds=3), "cpu").stages[0].bytes_down, abs=2 * 400)


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
    head = 3 * 16 + 3
    factors = 2 * 2 * (16 * 2)
    pooler = 0  # of the encoder: not trained
    assert [s.parameters for s in seen.stages] == [head, head + factors + pooler]
    assert [s.steps for s in seen.stages] == [7, 7]
    for stage in seen.stages:
        assert 2 * 4 * stage.parameters < stage.bytes_up < 2 * (4 * stage.parameters + 300 * 12)
        assert 2 * 4 * stage.parameters < stage.bytes_down


def test_noise_and_epsilon_are_those_of_the_run(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(privacy={"epsilon": 3.0}, local={"batch_size": 40, "learning_rate": 1.0}, simulation={"baselines": []})
    seen = forecast(plan, "cpu")
    result = simulate(plan, tmp_path / "run", device="cpu")
    for o in seen.organizations:
        declared = round_to_two_digits(o.examples)
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
    for o in forecast(toy_plan(), "cpu").organizations:
        assert (o.noise_multiplier, o.epsilon_allowed, o.epsilon_planned, o.delta) == (None, None, None, None)


def test_a_forecast_writes_nothing_and_says_how_long(toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    time = forecast(toy_plan(train="full", rounds=1), "cpu").time
    assert time is not None
    assert 0 < time.seconds.low < time.seconds.high
    assert list(tmp_path.iterdir()) == []


# --- without records


PRIVATE = {"privacy": {"epsilon": 8.0}, "local": {"batch_size": 40}, "labels": ("bad", "good", "so")}


def test_stated_numbers_need_no_data(toy_plan: NewPlan) -> None:
    """A coordinator has none. Figures are those that an organization will be charged, by the accountant; sizes, those of a run."""
    plan = toy_plan(**PRIVATE, data={"source": "/nowhere/records.csv"})
    seen = forecast_for(plan, (1000, 300, 5000), "cpu")
    assert (seen.test_examples, seen.time) == (None, None)
    assert [(o.name, o.examples, o.batch) for o in seen.organizations] == [
        ("org-1", 1000, pytest.approx(40)),
        ("org-2", 300, pytest.approx(40)),
        ("org-3", 5000, pytest.approx(40)),
    ]
    telling = planned_disclosures(plan, Policy())
    assert telling
    for o in seen.organizations:
        assert o.noise_multiplier is not None
        assert o.delta == pytest.approx(o.examples**-1.5)
        assert o.epsilon_planned == epsilon([*telling, Steps(o.noise_multiplier, 40 / o.examples, o.steps)], o.delta)
        assert 0.99 * 8 < o.epsilon_planned <= 8 == o.epsilon_allowed
    three = toy_plan(**PRIVATE, simulation={"clients": 3, "partition": "iid"})
    simulated = forecast(three, "cpu")
    assert seen.stages[0].parameters == simulated.stages[0].parameters
    assert seen.stages[0].bytes_up == pytest.approx(simulated.stages[0].bytes_up, rel=0.01)
    assert seen.stages[0].bytes_down == pytest.approx(simulated.stages[0].bytes_down, rel=0.05)


def test_without_labels_two_classes_are_assumed_and_said(toy_plan: NewPlan) -> None:
    seen = forecast_for(toy_plan(model={"pooling": "native"}), (100,), "cpu")
    assert seen.stages[0].parameters == 2 * 16 + 2
    assert len(seen.notes) == 1
    named = forecast_for(toy_plan(model={"pooling": "native"}, labels=("a", "b", "c")), (100,), "cpu")
    assert (named.stages[0].parameters, named.notes) == (3 * 16 + 3, ())


@pytest.mark.parametrize("examples", ["", "0", "1000,", "-5", "many", "1000;500", "1e3"])
def test_what_are_no_numbers_of_records(examples: str) -> None:
    with pytest.raises(PlanError):
        parse_examples(examples)


def test_numbers_of_records_are_read() -> None:
    assert parse_examples("1000, 5000,800") == (1000, 5000, 800)


def test_a_new_policy_says_what_a_site_will_say(toy_plan: NewPlan) -> None:
    """Rule for rule what the client's own check declines by, and the own bound is one that this check no longer declines."""
    plan = toy_plan(**PRIVATE)
    seen = forecast_for(plan, (1000, 300), "cpu")
    said = seen.new_policy
    resolved = seen.plan
    for o in seen.organizations:
        expected = {broken.rule for broken in find_violations(resolved, Policy(), o.examples)}
        mine = {refusal.rule for refusal in said.refused if o.name in refusal.organizations}
        assert mine | set(said.to_fill_in) == expected
        assert "budget.epsilon_per_run" in mine
        assert ("training.min_examples" in mine) == (o.name == "org-2")
    assert set(said.to_fill_in) == {"training.base_models", "training.units"}
    assert said.own_epsilon == Policy().budget.epsilon_per_run
    own = Policy(
        budget=BudgetRules(own_epsilon=said.own_epsilon),
        training=Policy().training.model_copy(
            update={"base_models": ("*",), "units": ("*",), "min_batch": 0.0, "min_examples": 0}
        ),
    )
    check_consent(resolved, own, 1000)
    with pytest.raises(PolicyError):
        check_consent(resolved, own.model_copy(update={"budget": BudgetRules()}), 1000)
    for bound, o in zip(said.bounds, seen.organizations, strict=True):
        assert bound.organization == o.name
        assert o.noise_multiplier is not None
        assert bound.noise_multiplier > o.noise_multiplier
        assert 0.99 * said.own_epsilon < bound.epsilon <= said.own_epsilon


def test_a_plan_within_the_bound_is_not_declined_by_it(toy_plan: NewPlan) -> None:
    said = forecast_for(toy_plan(**{**PRIVATE, "privacy": {"epsilon": 3.0}}), (1000,), "cpu").new_policy
    assert (said.own_epsilon, said.bounds) == (None, ())
    assert "budget.epsilon_per_run" not in {refusal.rule for refusal in said.refused}
