from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from torch import Tensor
from torch.nn import functional

from cotune.client.local_events import observe_client
from cotune.client.noise_calibration import check_examples, get_budget, noise_multiplier, planned_steps
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training import charged_steps as training
from cotune.client.training import request_context
from cotune.client.training.round import train_round
from cotune.data.tasks import classes
from cotune.data.tasks.classes import example_losses, logits
from cotune.data.tasks.text import collator
from cotune.errors import CotuneError, DataError, PolicyError, PrivacyError
from cotune.models.config import TrainMode
from cotune.models.encoding import encoded_examples
from cotune.models.trainable import State, TrainableModel, get_model
from cotune.plan.local_training import LocalTraining
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import Steps, calibrate
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGDConfig, DPSGDSetup, StepReport
from cotune.privacy.mechanisms.random_generators import PoissonSampler, seeded_generator
from cotune.privacy.policy import DisclosureRules, Policy
from cotune.strategies.types import apply_delta
from tests.support.engines import engine, take_steps
from tests.support.failures import fails_with
from tests.support.matrix import crossed
from tests.support.oracle_epsilon import oracle_epsilon

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]

PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}
MODES = get_args(TrainMode)
STAGES = [
    {"mode": "head", "rounds": 1, "local": {"steps": 3}},
    {"mode": "lora", "rounds": 2, "local": {"batch_size": 0.5}},
    {"mode": "full", "rounds": 1},
]


def trained(mode: str) -> dict[str, Any]:
    """Return a plan's keys for a mode: the last block where blocks are trained."""
    return {"train": mode, "layers": 1} if mode == "blocks" else {"train": mode}


def resident_model(plan: Plan) -> TrainableModel:
    return get_plan_model(plan, "cpu")


def everything(plan: Plan, state: State) -> State:
    """All parameters of the model in a state."""
    model = resident_model(plan)
    model.load(state)
    return model.state(name for name, _ in model.parameters())


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- without privacy


@pytest.mark.parametrize("mode", MODES)
def test_a_round_is_reproducible_to_the_bit(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, mode: str) -> None:
    plan = make_plan(**trained(mode))
    state = state_for(plan)
    first = train_round(plan, make_site(at="one"), 1, state)
    torch.manual_seed(99)
    resident_model(plan).load({})
    other = train_round(plan, make_site("bank", at="three"), 1, state)  # its batches are others
    get_model.cache_clear()
    again = train_round(plan, make_site(at="two"), 1, state)
    assert same(first.delta, again.delta)
    assert replace(first, delta={}) == replace(again, delta={})
    assert (first.organization, first.round, first.examples, first.steps, first.epsilon) == ("clinic", 1, 60, 4, None)
    assert not same(first.delta, other.delta)


@pytest.mark.parametrize(("mode", "privacy"), crossed(MODES, ["none", PRIVATE]))
def test_a_round_moves_what_its_stage_shares_and_nothing_else(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, mode: Any, privacy: Any
) -> None:
    plan = make_plan(**trained(mode), privacy=privacy)
    state = state_for(plan)
    before = everything(plan, state)
    update = train_round(plan, make_site(), 1, state)
    model = resident_model(plan)
    after = model.state(name for name, _ in model.parameters())
    names = model.names(mode, layers=plan.layers)
    assert list(update.delta) == names
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= set(names)
    assert {n for n in names if n not in moved} <= {n for n in names if "key.bias" in n}  # softmax ignores it
    assert all(d.dtype == torch.float32 for d in update.delta.values())
    for name in names:
        torch.testing.assert_close(before[name] + update.delta[name], after[name])


def test_a_round_starts_from_the_state_that_was_sent(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    state = state_for(plan)
    first = train_round(plan, make_site(at="one"), 1, state)
    moved = apply_delta(state, first.delta)
    train_round(plan, make_site("bank"), 1, moved)  # somebody else's turn with the same model
    assert same(train_round(plan, make_site(at="two"), 1, state).delta, first.delta)
    assert not same(train_round(plan, make_site(at="three"), 1, moved).delta, first.delta)


def gradient_descent(plan: Plan, site: Site, state: State, rates: Callable[[str], float], steps: int) -> State:
    """Plain full-batch gradient descent on all records at once: an independent account of what a round does."""
    model = resident_model(plan)
    model.load(state)
    parameters = dict(model.parameters())
    batch = collator(model.module, model.loaded.reader, model.device)(encoded_examples(site.dataset(plan.labels), model))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    names = list(state)
    for _ in range(steps):
        loss = example_losses(model.module, batch).mean()
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                parameters[name] -= rates(name) * gradient
    return {name: parameters[name].detach() - state[name] for name in names}


@pytest.mark.parametrize(("mode", "kind"), crossed(MODES, ["bert", "llama"]))
def test_full_batches_are_gradient_descent(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, mode: str, kind: str
) -> None:
    local = {"batch_size": 60, "steps": 3, "learning_rate": 0.25, "physical_batch_size": 7}
    plan = make_plan(kind, **trained(mode), local=local)
    state = state_for(plan)
    site = make_site()
    got = train_round(plan, site, 1, state).delta
    expected = gradient_descent(plan, site, state, lambda _: 0.25, 3)
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(got[name], delta, atol=2e-5, rtol=1e-3)


def test_the_head_has_its_own_rate(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    local = {"batch_size": 60, "steps": 2, "learning_rate": 0.1, "head_learning_rate": 0.7}
    plan = make_plan(train="lora", local=local)
    state = state_for(plan)
    site = make_site()
    got = train_round(plan, site, 1, state).delta
    expected = gradient_descent(plan, site, state, lambda name: 0.7 if name.startswith("classifier") else 0.1, 2)
    for name, delta in expected.items():
        torch.testing.assert_close(got[name], delta, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("privacy", ["none", PRIVATE])
def test_the_size_of_the_physical_batch_has_no_influence(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, privacy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under privacy with the same noise and the same sample, which no plan can ask for."""
    from numpy.random import default_rng

    def seeded(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
        return take_steps(config, replace(setup, noise_generator=default_rng(1), sampling_generator=default_rng(2)))

    monkeypatch.setattr(training, "DPSGD", engine(seeded))
    deltas = []
    for size in (1, 64):
        plan = make_plan(train="lora", privacy=privacy, local={"physical_batch_size": size, "batch_size": 0.5})
        deltas.append(train_round(plan, make_site(at=str(size)), 1, state_for(plan)).delta)
    one_by_one, at_once = deltas
    for name, tensor in one_by_one.items():
        torch.testing.assert_close(at_once[name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_other_optimizers_start_afresh_in_every_round(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, optimizer: str
) -> None:
    """The first step of Adam moves every parameter by the learning rate."""
    plan = make_plan(local={"optimizer": optimizer, "batch_size": 60, "steps": 1, "learning_rate": 0.01})
    state = state_for(plan)
    for round in (1, 2):
        delta = train_round(plan, make_site(), round, state).delta
        assert float(delta["classifier.weight"].abs().min()) == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(("mode", "privacy"), crossed(MODES, ["none", PRIVATE]))
def test_empty_batches(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, mode: str, privacy: Any) -> None:
    """With one expected record per step, a third of the batches is empty: that none of 40 is has a probability of 1e-8."""
    told: list[dict[str, Any]] = []
    plan = make_plan(**trained(mode), privacy=privacy, local={"batch_size": 1 / 60, "steps": 40, "learning_rate": 0.01})
    with observe_client(lambda what, details: told.append(details) if what == "step" else None):
        update = train_round(plan, make_site(), 1, state_for(plan))
    assert update.steps == 40
    assert [t["step"] for t in told] == list(range(1, 41))
    assert sum(t["loss"] is None for t in told) >= 1
    assert sum(t["loss"] is not None for t in told) >= 1
    assert all(bool(d.isfinite().all()) for d in update.delta.values())


def is_empty(seed: int, steps: int) -> bool:
    return not any(PoissonSampler(60, 1 / 60, steps, seeded_generator(seed, training.BATCHES, "clinic", 1)))


def test_a_round_of_empty_batches_changes_nothing(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """Without noise, as of an organization with few records and a small rate: that is no failure."""
    seed = next(seed for seed in range(1000) if is_empty(seed, steps=2))
    plan = make_plan(seed=seed, local={"batch_size": 1, "steps": 2})
    update = train_round(plan, make_site(), 1, state_for(plan))
    assert update.steps == 2
    assert not any(bool(difference.any()) for difference in update.delta.values())


def test_a_model_that_is_sure_of_every_record_is_sent(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """Of a single class, and so sure that no gradient is left in float32: that is no failure either."""
    plan = make_plan(local={"batch_size": "all", "steps": 1})
    targets = make_site(at="all").dataset(plan.labels).targets
    site = make_site(rows=[row for row, target in enumerate(targets) if target == 0])
    state = {name: tensor.clone() for name, tensor in state_for(plan).items()}
    [bias] = [tensor for name, tensor in state.items() if tensor.shape == (len(plan.labels),)]
    bias.fill_(1.0)[0] += 60.0
    update = train_round(plan, site, 1, state)
    assert not any(bool(difference.any()) for difference in update.delta.values())


def test_a_diverged_model_is_not_sent(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(local={"learning_rate": 1e3, "weight_decay": 10.0, "steps": 40})
    site = make_site()
    with fails_with("run.diverged"):
        train_round(plan, site, 1, state_for(plan))
    assert not (site.folder / "outbox").exists()


def test_a_model_that_does_not_move_is_not_sent(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(local={"learning_rate": 1e-60})
    with fails_with("run.nothing_trained"):
        train_round(plan, make_site(), 1, state_for(plan))


# --- what is refused before anything happens


def test_too_few_examples(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, local={"batch_size": 16})
    site = make_site(rows=range(15))
    with fails_with("data.too_few_records", "clinic", "15", "16"):
        train_round(plan, site, 1, state_for(plan))
    assert site.ledger().spent() == []


@pytest.mark.parametrize(
    ("examples", "batch_size", "enough"), [(16, 16, True), (15, 16, False), (4, 0.25, True), (3, 0.25, False)]
)
def test_how_many_examples_fill_a_batch(examples: int, batch_size: float, enough: bool) -> None:
    local = LocalTraining(batch_size=batch_size)
    if enough:
        check_examples(examples, local, "clinic")
    else:
        with pytest.raises(DataError):
            check_examples(examples, local, "clinic")


@pytest.mark.parametrize("round", [0, 4, -1])
def test_a_round_that_the_plan_does_not_have(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, round: int) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    with pytest.raises((CotuneError, ValueError)):
        train_round(plan, site, round, state_for(plan))
    assert site.ledger().spent() == []


@pytest.mark.parametrize("lacking", ["classifier.bias", "all"])
def test_a_state_without_the_stages_parameters_costs_nothing(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, lacking: str
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    state = {name: t for name, t in state_for(plan).items() if lacking not in (name, "all")}
    with pytest.raises(CotuneError, match=r"classifier\."):
        train_round(plan, site, 1, state)
    assert site.ledger().spent() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_costs_nothing(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, value: float
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    state = state_for(plan)
    state["classifier.bias"][0] = value
    with pytest.raises(CotuneError):
        train_round(plan, site, 1, state)
    assert site.ledger().spent() == []


def test_a_class_that_the_plan_lacks_costs_nothing(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, labels=("bad", "good"))
    site = make_site(simulated=True)
    with fails_with("data.unknown_class", "so"):
        train_round(plan, site, 1, state_for(plan))
    assert site.ledger().spent() == []


def test_gradients_that_are_wrong_cost_nothing(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that mixes the examples of a batch has no gradient per example."""

    def mixed(module: Any, batch: Any, weights: Tensor | None) -> Tensor:
        scores = logits(module, batch)
        return functional.cross_entropy(scores + 3 * scores.roll(1, dims=0), batch["labels"], reduction="none")

    monkeypatch.setattr(classes, "example_losses", mixed)
    plan = make_plan(train="lora", privacy=PRIVATE)
    site = make_site()
    with fails_with("privacy.wrong_gradients"):
        train_round(plan, site, 1, state_for(plan))
    assert site.ledger().spent() == []


# --- the ledger


def run(plan: Plan, site: Site, state: State, rounds: range) -> State:
    for round in rounds:
        state = apply_delta(state, train_round(plan, site, round, state).delta)
    return state


def test_the_whole_run_stays_within_its_budget(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    state = state_for(plan)
    stated = []
    for round in (1, 2, 3):
        update = train_round(plan, site, round, state)
        state = apply_delta(state, update.delta)
        assert update.epsilon is not None
        stated.append(update.epsilon)
        spent_so_far = oracle_epsilon(site.ledger().spent(), 1e-3)
        assert spent_so_far * 0.995 <= update.epsilon <= spent_so_far * 1.005 + 0.01  # stated with two digits, rounded up
    spent = site.ledger().spent(plan.plan_id)
    assert len({s.noise_multiplier for s in spent}) == 1
    assert [(s.sample_rate, s.count) for s in spent] == [(0.2, 4)] * 3
    assert site.ledger().rounds(plan.plan_id) == [1, 2, 3]
    assert stated == sorted(stated)
    assert 0.97 * 2 <= stated[-1] <= 2.0  # the budget is used, and not exceeded
    assert oracle_epsilon(spent, 1e-3) <= 2.0


def test_a_run_in_stages_stays_within_its_budget(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, train=STAGES)
    site = make_site()
    run(plan, site, state_for(plan, 4), range(1, 5))
    spent = site.ledger().spent()
    assert [(s.sample_rate, s.count) for s in spent] == [(0.2, 3), (0.5, 4), (0.5, 4), (0.2, 4)]
    assert len({s.noise_multiplier for s in spent}) == 1
    assert 0.97 * 2 <= oracle_epsilon(spent, 1e-3) <= 2.0


def test_a_round_that_fails_after_training_is_settled(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Site, "store_update", full)
    with pytest.raises(OSError, match="no space"):
        train_round(plan, site, 1, state_for(plan))
    [charge] = [charge for charge in site.ledger().charges() if charge.purpose == "training"]
    assert (charge.state, charge.steps.count) == ("settled", 4)
    assert site.ledger().seconds(plan.plan_id) > 0
    assert site.ledger().last_answered_round(plan.plan_id) == 0


def test_the_ledger_is_charged_before_training(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    charged: list[list[Steps]] = []

    def crashing(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
        charged.append(site.ledger().spent())
        yield next(take_steps(config, setup))
        raise MemoryError

    monkeypatch.setattr(training, "DPSGD", engine(crashing))
    with pytest.raises(MemoryError):
        train_round(plan, site, 1, state_for(plan))
    (before,) = charged
    assert [(s.sample_rate, s.count) for s in before] == [(0.2, 4)]
    assert site.ledger().spent() == before  # the worst case stands, though one step ran
    assert not (site.folder / "outbox").exists()


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets the training fail after so many steps."""

    def crashing(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
        for report in take_steps(config, setup):
            if report.step > step:
                raise MemoryError
            yield report

    monkeypatch.setattr(training, "DPSGD", engine(crashing))


def test_after_a_crash_the_rest_ends_within_the_budget(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    state = run(plan, site, state_for(plan), range(1, 2))
    with monkeypatch.context() as patch:
        crash_at(patch, 1)
        with pytest.raises(MemoryError):
            train_round(plan, site, 2, state)
    run(plan, Site(site.folder), state, range(2, 4))
    spent = site.ledger().spent()
    assert [s.count for s in spent] == [4] * 4
    assert spent[0].noise_multiplier == spent[1].noise_multiplier < spent[2].noise_multiplier
    assert spent[3].noise_multiplier == pytest.approx(spent[2].noise_multiplier, rel=5e-3)
    assert 0.97 * 2 <= oracle_epsilon(spent, 1e-3) <= 2.0


def test_crash_after_crash_never_exceeds_the_budget(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(privacy=PRIVATE, rounds=1)
    site = make_site()
    state = state_for(plan)
    crash_at(monkeypatch, 0)
    outcomes = []
    for _ in range(3):
        with pytest.raises((MemoryError, PrivacyError)) as caught:
            train_round(plan, site, 1, state)
        outcomes.append(caught.type)
        assert len(site.ledger().spent()) == outcomes.count(MemoryError)  # a refusal charges nothing
        assert oracle_epsilon(site.ledger().spent(), 1e-3) <= 2.0
    assert outcomes[0] is MemoryError


def test_a_finished_run_does_not_go_on(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """More of the same rounds, as a server may ask for."""
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    state = run(plan, site, state_for(plan), range(1, 4))
    before = site.ledger().spent()
    assert len(before) == 3
    for round in (1, 3):
        with fails_with("privacy.answered_round"):
            run(plan, site, state, range(round, round + 1))
    assert site.ledger().spent() == before
    assert oracle_epsilon(before, 1e-3) <= 2.0


def total(epsilon: float, own: float | None = None) -> Policy:
    """A policy that allows everything but more than ε in total."""
    allowed = Policy.permissive()
    rules = {**dict(allowed.budget), "epsilon_total": epsilon, "delta_total": 1e-3, "own_epsilon": own}
    return allowed.model_copy(update={"budget": type(allowed.budget)(**rules)})


def test_what_another_plan_spent_counts_against_the_total(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    site = make_site(policy=total(4.0))
    first = make_plan(privacy=PRIVATE, rounds=1)
    run(first, site, state_for(first), range(1, 2))
    plan = make_plan(privacy={**PRIVATE, "epsilon": 2.5}, rounds=4)
    left = 4.0 - filter_epsilon(site.ledger().spent())
    with pytest.raises(PolicyError) as declined:
        train_round(plan, site, 1, state_for(plan))
    assert declined.value.rule == "budget.epsilon_total"
    assert f"the plan asks for ε = 2.5 in 4 rounds, and {left:.2f} of the total 4 are left" in str(declined.value)
    assert len(site.ledger().spent()) == 1  # refused before anything was charged
    fits = int(re.search(r"at most (\d) of its rounds would fit", str(declined.value))[1])  # type: ignore[index]
    sigma = calibrate([(0.2, 16)], epsilon=2.5, delta=1e-3)
    assert 0 < fits < 4
    spent = site.ledger().spent()
    within, over = ([*spent, Steps(sigma, 0.2, 4 * rounds)] for rounds in (fits, fits + 1))
    assert filter_epsilon(within) <= 4.0 < filter_epsilon(over)


def filter_epsilon(spent: Sequence[Steps]) -> float:
    """What a Rényi filter for ε = 4.0 at δ = 0.001 counts, by dp-accounting itself."""
    accountant = RdpAccountant(orders=[4])
    for steps in spent:
        accountant.compose(steps.event())
    return float(accountant.get_epsilon(1e-3 / 2))


def test_an_own_epsilon_makes_room(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """An organization may spend less than the plan allows: it adds more noise."""
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=total(3.0, own=1.0))
    run(plan, site, state_for(plan), range(1, 4))
    assert 0.97 <= oracle_epsilon(site.ledger().spent(), 1e-3) <= 1.0
    other = make_plan(privacy=PRIVATE, seed=8)
    run(other, site, state_for(other), range(1, 4))
    assert oracle_epsilon(site.ledger().spent(), 1e-3) <= 3.0


def test_shuffled_and_newly_exported_records_are_the_same_data(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor
) -> None:
    plan = make_plan(privacy=PRIVATE, rounds=1)
    site = make_site(rows=range(50))
    run(plan, site, state_for(plan), range(1, 2))
    other = make_plan(privacy=PRIVATE, rounds=1, seed=8)
    again = make_site(rows=list(reversed(range(50))))
    run(other, again, state_for(other), range(1, 2))
    assert [d.records for d in again.ledger().data_sets()] == [50]
    known = len(set(again.dataset(plan.labels).identities()))
    grown = make_site(rows=range(60))
    account = Account(other, grown.policy(), grown, grown.dataset(other.labels))
    assert account.data != grown.ledger().data_sets()[0].fingerprint
    assert grown.ledger().data_sets()[1].shares == {grown.ledger().data_sets()[0].fingerprint: known}


def test_a_repeated_request_gets_the_same_update_for_nothing(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    state = state_for(plan)
    first = train_round(plan, site, 1, state)
    before = site.ledger().spent()

    def untouched(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be trained")

    monkeypatch.setattr(training, "DPSGD", untouched)
    monkeypatch.setattr(request_context, "load_trained_model", untouched)
    again = train_round(plan, Site(site.folder), 1, {name: t.clone() for name, t in state.items()})
    assert same(first.delta, again.delta)
    assert replace(first, delta={}) == replace(again, delta={})
    assert site.ledger().spent() == before


def test_noise_is_never_repeated(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE)
    state = state_for(plan)
    torch.manual_seed(0)
    first = train_round(plan, make_site(at="one"), 1, state)
    torch.manual_seed(0)
    assert not same(train_round(plan, make_site(at="two"), 1, state).delta, first.delta)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_bfloat16_does_not_hinder_private_training(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, mode: str
) -> None:
    """On hardware with bfloat16, precision = auto means it."""
    plan = make_plan(**trained(mode), privacy=PRIVATE, model={"precision": "bfloat16"})
    site = make_site()
    update = train_round(plan, site, 1, state_for(plan))
    assert update.steps == 4
    assert len(site.ledger().spent()) == 1


@pytest.mark.parametrize(("mode", "kind"), crossed(MODES, ["distilbert", "gpt2", "llama", "qwen2"]))
def test_every_architecture_trains_privately(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, kind: str, mode: str
) -> None:
    plan = make_plan(kind, **trained(mode), privacy=PRIVATE)
    site = make_site()
    update = train_round(plan, site, 1, state_for(plan))
    assert all(bool(d.any()) for d in update.delta.values())


# --- σ and its steps


def test_planned_steps(make_plan: MakePlan) -> None:
    staged = make_plan(train=STAGES, local={"batch_size": 12})
    assert planned_steps(staged, 60) == [(0.2, 3), (0.5, 8), (0.2, 4)]
    assert planned_steps(staged, 60, 2) == [(0.5, 8), (0.2, 4)]
    assert planned_steps(staged, 60, 3) == [(0.5, 4), (0.2, 4)]
    assert planned_steps(staged, 60, 4) == [(0.2, 4)]
    assert planned_steps(staged, 60, 5) == []
    assert planned_steps(make_plan(local={"batch_size": 100}), 60) == [(1.0, 12)]


def test_the_noise_is_the_least_that_suffices(make_plan: MakePlan) -> None:
    plan = make_plan(privacy=PRIVATE)
    assert isinstance(plan.privacy, RecordPrivacy)
    policy = Policy.permissive()
    budget = get_budget(plan.privacy, policy, 60)
    sigma = noise_multiplier(plan, policy, budget, 60, 1)
    assert oracle_epsilon([Steps(sigma, 0.2, 12)], 1e-3) <= 2.0
    assert oracle_epsilon([Steps(sigma * 0.98, 0.2, 12)], 1e-3) > 2.0
    assert noise_multiplier(plan, policy, budget, 60, 3, spent=[Steps(sigma, 0.2, 8)]) == sigma


# --- what an observer sees


def test_observers_are_told_of_every_step(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    told: list[tuple[str, dict[str, Any]]] = []
    plan = make_plan(privacy=PRIVATE)
    with observe_client(lambda what, details: told.append((what, details))):
        site = make_site()
        update = train_round(plan, site, 1, state_for(plan))
    distinct = len(set(site.dataset(plan.labels).inputs()))
    read = [details for what, details in told if what == "features"]
    assert {each.pop("source") for each in read} == {records.source for records, _ in site.dataset(plan.labels).parts}
    assert {"organization": "clinic", "done": distinct, "total": distinct} in read
    steps = [details for what, details in told if what == "step"]
    assert [(s["organization"], s["round"], s["step"], s["steps"]) for s in steps] == [("clinic", 1, i, 4) for i in range(1, 5)]
    assert {math.ceil(s["epsilon"] * 100) / 100 for s in steps} == {update.epsilon}


# --- the noise that an update states


def test_without_privacy_no_noise_is_stated(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    assert train_round(plan, make_site(), 1, state_for(plan)).noise_variance is None


def test_reported_noise_is_that_of_plain_sgd(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """T (ησC/B)² with B = 0.2 · 60, and the head's own rate."""
    local = {"learning_rate": 0.1, "head_learning_rate": 0.4, "momentum": 0.0}
    plan = make_plan(train="full", privacy=PRIVATE, local=local, strategy={"weighting": "noise_aware"})
    site = make_site()
    update = train_round(plan, site, 1, state_for(plan))
    (charge,) = site.ledger().spent()
    assert update.noise_variance is not None
    assert update.noise_variance.keys() == update.delta.keys()
    for name, variance in update.noise_variance.items():
        rate = 0.4 if name.startswith("classifier") else 0.1
        assert variance == float(f"{4 * (rate * charge.noise_multiplier / 12) ** 2:.3g}")


def test_the_outbox_keeps_the_stated_noise(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, strategy={"weighting": "noise_aware"})
    site = make_site()
    state = state_for(plan)
    assert train_round(plan, site, 1, state).noise_variance == train_round(plan, site, 1, state).noise_variance is not None


def test_noise_is_reported_only_where_needed_and_allowed(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE)
    assert train_round(plan, make_site(at="one"), 1, state_for(plan)).noise_variance is None
    plan = make_plan(privacy=PRIVATE, strategy={"weighting": "noise_aware"})
    silent = Policy.permissive().model_copy(update={"disclosures": DisclosureRules(example_count="exact", noise_level=False)})
    site = make_site(at="two", policy=silent)
    with fails_with("policy.disclosures.noise_level", "disclosures.noise_level"):
        train_round(plan, site, 1, state_for(plan))
    assert site.ledger().spent() == []


@pytest.mark.parametrize("declared", [40, 50, 4000])
def test_reported_noise_does_not_reveal_the_record_count(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, declared: int
) -> None:
    """It is that of an organization of the declared size: the same for any true size."""
    plan = make_plan(privacy={"epsilon": 2.0}, strategy={"weighting": "noise_aware"})
    rules = DisclosureRules(example_count="declared", declared_examples=declared)
    policy = Policy.permissive().model_copy(update={"disclosures": rules})
    found = [train_round(plan, make_site(at=f"of-{n}", rows=range(n), policy=policy), 1, state_for(plan)) for n in (40, 50, 60)]
    assert found[0].noise_variance == found[1].noise_variance == found[2].noise_variance is not None
    assert [update.examples for update in found] == [declared] * 3
    exact = train_round(plan, make_site(at="exact", rows=range(50)), 1, state_for(plan))
    assert (exact.noise_variance == found[1].noise_variance) == (declared == 50)
