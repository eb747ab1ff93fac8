"""What is told beside an update: as little as the policy says, and what is noised is charged like training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cotune.client.account import Account
from cotune.client.budget import planned_telling
from cotune.client.site import Site
from cotune.client.telling import Teller
from cotune.client.training import train_round
from cotune.models.sharing import State
from cotune.plan.schema import Plan
from cotune.privacy.accounting import Steps, epsilon
from cotune.privacy.policy import Policy, TellRules

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3}
ASKS = {"local_metrics": True, "label_histogram": True}


def tells(**rules: Any) -> Policy:
    return Policy.permissive().model_copy(update={"tell": TellRules(**rules)})


def account(make_plan: MakePlan, make_site: MakeSite, policy: Policy, **tables: Any) -> Account:
    plan, site = make_plan(**{"privacy": PRIVATE, **tables}), make_site(policy=policy)
    return Account(plan, policy, site, site.holdings(plan.labels))


@pytest.mark.parametrize(
    ("rules", "count", "told"),
    [
        ({"example_count": "exact"}, 1234, 1234),
        ({"example_count": "declared", "declared_examples": 500}, 1234, 500),
        ({"example_count": "declared"}, 1234, 1),
        ({"example_count": "rounded"}, 1234, 1000),
        ({"example_count": "rounded"}, 15, 20),
        ({"example_count": "rounded"}, 96, 100),
        ({"example_count": "rounded"}, 7, 7),
    ],
)
def test_the_example_count(make_plan: MakePlan, make_site: MakeSite, rules: dict[str, Any], count: int, told: int) -> None:
    mine = account(make_plan, make_site, tells(**rules))
    assert Teller(mine).examples(count, 1) == told
    assert mine.ledger.charges() == []


def test_a_noised_count_is_drawn_once_and_charged_once(make_plan: MakePlan, make_site: MakeSite) -> None:
    policy = tells(example_count="noised", noise_multiplier=20.0)
    mine = account(make_plan, make_site, policy)
    first = Teller(mine).examples(1000, 1)
    again = account(make_plan, make_site, policy)  # another process
    assert {Teller(again).examples(1000, round) for round in (1, 2, 3)} == {first}
    assert [(c.purpose, c.steps, c.state) for c in mine.ledger.charges()] == [("example count", Steps(20.0, 1.0, 1), "settled")]


def test_the_noise_is_what_is_charged(make_plan: MakePlan, make_site: MakeSite) -> None:
    """σ on a count; √2·σ on each of the two numbers of the metrics, which one record changes together."""
    mine = account(make_plan, make_site, tells(local_metrics="noised", noise_multiplier=20.0), tell=ASKS)
    teller = Teller(mine, generator=np.random.default_rng(0))
    draws = np.array([[teller._noised(100, 1.0), teller._noised(100, math.sqrt(2))] for _ in range(4000)])
    assert draws.mean(axis=0) == pytest.approx([100, 100], abs=2.5)
    assert draws.std(axis=0) == pytest.approx([20, 20 * math.sqrt(2)], rel=0.05)


def test_nothing_is_told_that_the_plan_does_not_ask_for(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE)
    update = train_round(plan, make_site(policy=tells(local_metrics="clear", label_histogram="noised")), 1, state_for(plan))
    assert update.told == {}


def test_nothing_is_told_that_the_policy_does_not_allow(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan, site = make_plan(privacy=PRIVATE, tell=ASKS), make_site(policy=tells())
    update = train_round(plan, site, 1, state_for(plan))
    assert update.told == {}
    assert update.examples == 1
    assert [c.purpose for c in site.ledger().charges()] == ["training"]


def test_clear_metrics_are_those_of_the_received_model(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy="none", tell=ASKS)
    site = make_site(policy=tells(local_metrics="clear"))
    told = train_round(plan, site, 1, state_for(plan)).told
    assert told["records"] == 60
    assert 0 <= told["correct"] <= 60
    assert set(told) == {"correct", "records"}
    assert site.ledger().charges() == []
    left = [e.body["what"] for e in site.ledger().entries() if e.kind == "unprotected"]
    assert left == ["training", "local metrics"]  # no ε bounds them, and the ledger says so


@pytest.mark.parametrize("train", ["head", "lora"])
def test_what_is_told_stays_within_the_budget(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, train: str) -> None:
    policy = tells(local_metrics="noised", label_histogram="noised", example_count="noised", noise_multiplier=10.0)
    plan, site = make_plan(privacy=PRIVATE, tell=ASKS, train=train, rounds=2), make_site(policy=policy)
    state = state_for(plan)
    told = [train_round(plan, site, round, state).told for round in (1, 2)]
    assert set(told[0]) == {"correct", "records", "label bad", "label good", "label so"}
    assert {k: v for k, v in told[0].items() if k.startswith("label")} == {
        k: v for k, v in told[1].items() if k.startswith("label")
    }
    charges = site.ledger().charges()
    purposes = ["label histogram", "local metrics", "example count", "training", "local metrics", "training"]
    assert [c.purpose for c in charges] == purposes
    assert 0.97 * 2.0 <= epsilon([c.steps for c in charges], 1e-3) <= 2.0  # all of it together is calibrated to ε
    assert planned_telling(plan, policy) == [Steps(10.0, 1.0, 4)]
    assert planned_telling(plan, policy, 2) == [Steps(10.0, 1.0, 1)]
