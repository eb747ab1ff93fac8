"""What is told beside an update: as little as the policy says, and what is noised is charged like training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cotune.client.noise_calibration import planned_disclosures
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.errors import PolicyError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.policy import DisclosureRules, Policy
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3}
ASKS = {"local_metrics": True, "label_histogram": True}


def tells(**rules: Any) -> Policy:
    return Policy.permissive().model_copy(update={"disclosures": DisclosureRules(**rules)})


def account(make_plan: MakePlan, make_site: MakeSite, policy: Policy, **tables: Any) -> Account:
    plan = make_plan(**{"privacy": PRIVATE, **tables})
    site = make_site(policy=policy)
    return Account(plan, policy, site, site.dataset(plan.labels))


@pytest.mark.parametrize(
    ("rules", "held", "told"),
    [
        ({"example_count": "exact"}, 57, 57),
        ({"example_count": "declared", "declared_examples": 500}, 57, 500),
        ({"example_count": "rounded"}, 57, 60),
        ({"example_count": "rounded"}, 54, 50),
        ({"example_count": "rounded"}, 7, 7),
    ],
)
def test_the_public_number(make_plan: MakePlan, make_site: MakeSite, rules: dict[str, Any], held: int, told: int) -> None:
    policy = tells(**rules)
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=policy, rows=range(held))
    mine = Account(plan, policy, site, site.dataset(plan.labels))
    assert (mine.public_examples, mine.true_examples) == (told, held)
    assert mine.ledger.charges() == []


def test_a_number_that_is_declared_must_be_given(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=tells(example_count="declared"))
    with pytest.raises(PolicyError) as declined:
        train_round(plan, site, 1, state_for(plan))
    assert declined.value.rule == "disclosures.declared_examples"
    assert not site.ledger_file.exists()


def test_a_noised_number_is_charged_and_drawn_once_per_plan(make_plan: MakePlan, make_site: MakeSite) -> None:
    policy = tells(example_count="noised", noise_multiplier=20.0)
    mine = account(make_plan, make_site, policy)
    first = mine.public_examples
    assert {account(make_plan, make_site, policy).public_examples for _ in range(3)} == {first}  # other processes
    assert [(c.purpose, c.steps, c.state) for c in mine.ledger.charges()] == [
        ("example count", Steps(20.0, 1.0, 1, "geometric"), "settled")
    ]
    other = account(make_plan, make_site, policy, seed=8)
    assert other.public_examples >= 1
    assert len(mine.ledger.charges()) == 2


def test_a_crash_before_the_number_is_told_counts_as_spent(make_plan: MakePlan, make_site: MakeSite) -> None:
    """The charge is durable before anything is drawn, and nothing is told that is not remembered."""

    class Crash(np.random.Generator):
        def geometric(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

    policy = tells(example_count="noised")
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=policy)
    broken = Account(plan, policy, site, site.dataset(plan.labels), generator=Crash(np.random.PCG64()))
    with pytest.raises(KeyboardInterrupt):
        _ = broken.public_examples
    again = account(make_plan, make_site, policy)
    assert again.public_examples >= 1
    assert [(c.purpose, c.state) for c in again.ledger.charges()] == [("example count", "reserved"), ("example count", "settled")]


def test_reported_epsilon_includes_a_number_drawn_later(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """A server that asked for round 3 first, in a request that fails, was told ε = 1.02 in round 1; the ledger said 1.30."""
    policy = tells(example_count="noised", noise_multiplier=5.0)
    plan = make_plan(privacy=PRIVATE, rounds=3)
    site = make_site(policy=policy)
    assert Account(plan, policy, site, site.dataset(plan.labels), round=3).public_examples >= 1
    stated = train_round(plan, site, 1, state_for(plan)).epsilon
    assert stated is not None
    assert stated >= epsilon(site.ledger().spent(plan.plan_id), 1e-3)


def test_what_nobody_sees_draws_nothing(make_plan: MakePlan, make_site: MakeSite) -> None:
    policy = tells(example_count="noised")
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=policy)
    shown = Account(plan, policy, site, site.dataset(plan.labels), draws=False)
    assert shown.public_examples == 60
    assert not site.ledger_file.exists()
    drawn = account(make_plan, make_site, policy).public_examples
    assert Account(plan, policy, site, site.dataset(plan.labels), draws=False).public_examples == drawn


def test_a_total_that_is_spent_tells_no_number(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Plans that are refused afterwards could else draw it again and again."""
    policy = tells(example_count="noised", noise_multiplier=1.0)
    policy = policy.model_copy(update={"budget": policy.budget.model_copy(update={"epsilon_total": 8.0})})

    def draw(seed: int) -> None:
        plan = make_plan(privacy=PRIVATE, seed=seed)
        _ = Account(plan, policy, site, site.dataset(plan.labels)).public_examples

    site = make_site(policy=policy)
    draw(0)
    with fails_with("policy.budget.epsilon_total", "budget.epsilon_total"):
        for seed in range(1, 7):  # six of ε = 1.32 each fit into 8
            draw(seed)
    assert epsilon([c.steps for c in site.ledger().charges()], 1e-6) <= 8.0


def test_the_noise_is_what_is_charged(make_plan: MakePlan, make_site: MakeSite) -> None:
    """σ on a count; √2·σ on each of the two numbers of the metrics, which one record changes together."""
    policy = tells(local_metrics="noised", noise_multiplier=20.0)
    plan = make_plan(privacy=PRIVATE, disclosures=ASKS)
    site = make_site(policy=policy)
    mine = Account(plan, policy, site, site.dataset(plan.labels), generator=np.random.default_rng(0))
    draws = np.array([[*mine.noised([100], 1.0), *mine.noised([100], math.sqrt(2))] for _ in range(4000)])
    assert draws.mean(axis=0) == pytest.approx([100, 100], abs=2.5)
    assert draws.std(axis=0) == pytest.approx([20, 20 * math.sqrt(2)], rel=0.05)


def test_no_low_bit_tells_a_sum(make_plan: MakePlan, make_site: MakeSite) -> None:
    mine = account(make_plan, make_site, tells(noise_multiplier=20.0))
    told = mine.noised([1 / 3, 2 / 7, 0.1], 1.0)
    assert all(value * 2**20 == int(value * 2**20) for value in told)


def test_nothing_is_told_that_the_plan_does_not_ask_for(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=tells(example_count="exact", local_metrics="clear", label_histogram="noised"))
    update = train_round(plan, site, 1, state_for(plan))
    assert update.disclosures == {}


def test_nothing_is_told_that_the_policy_does_not_allow(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, disclosures=ASKS)
    site = make_site(policy=tells(example_count="declared", declared_examples=55))
    update = train_round(plan, site, 1, state_for(plan))
    assert update.disclosures == {}
    assert update.examples == 55
    assert [c.purpose for c in site.ledger().charges()] == ["training"]


def test_clear_metrics_are_those_of_the_received_model(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy="none", disclosures=ASKS)
    site = make_site(policy=tells(example_count="exact", local_metrics="clear"))
    told = train_round(plan, site, 1, state_for(plan)).disclosures
    assert told["records"] == 60
    assert 0 <= told["correct"] <= 60
    assert set(told) == {"correct", "records"}
    assert site.ledger().charges() == []
    left = [e.body["what"] for e in site.ledger().entries() if e.kind == "unprotected"]
    assert left == ["training", "local metrics"]  # no ε bounds them, and the ledger says so


@pytest.mark.parametrize("train", ["head", "lora"])
def test_what_is_told_stays_within_the_budget(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, train: str) -> None:
    policy = tells(local_metrics="noised", label_histogram="noised", example_count="noised", noise_multiplier=10.0)
    plan = make_plan(privacy=PRIVATE, disclosures=ASKS, train=train, rounds=2)
    site = make_site(policy=policy)
    state = state_for(plan)
    told = [train_round(plan, site, round, state).disclosures for round in (1, 2)]
    assert set(told[0]) == {"correct", "records", "label bad", "label good", "label so"}
    assert {k: v for k, v in told[0].items() if k.startswith("label")} == {
        k: v for k, v in told[1].items() if k.startswith("label")
    }
    charges = site.ledger().charges()
    purposes = ["example count", "label histogram", "local metrics", "training", "local metrics", "training"]
    assert [c.purpose for c in charges] == purposes
    assert 0.97 * 2.0 <= epsilon([c.steps for c in charges], 1e-3) <= 2.0  # all of it together is calibrated to ε
    assert planned_disclosures(plan, policy) == [Steps(10.0, 1.0, 1, "geometric"), Steps(10.0, 1.0, 3)]
    assert planned_disclosures(plan, policy, 2, counted=True) == [Steps(10.0, 1.0, 1)]
