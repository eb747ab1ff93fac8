"""The loss that some weightings want: of the received model, as the policy has it, charged before it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cotune.client.noise_calibration import planned_disclosures
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training import disclosures
from cotune.client.training.disclosures import Disclosures
from cotune.client.training.round import train_round
from cotune.client.training.stage_setup.from_records import build_setup
from cotune.data.tasks.classes import example_losses
from cotune.data.tasks.text import collator
from cotune.models.encoding import encoded_examples
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.policy import DisclosureRules, Policy
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3}
WEIGHTED = {"weighting": "q_fair"}


def tells(**rules: Any) -> Policy:
    return Policy.permissive().model_copy(update={"disclosures": DisclosureRules(**{"example_count": "exact", **rules})})


def unprotected(site: Site) -> list[str]:
    return [entry.body["what"] for entry in site.ledger().entries() if entry.kind == "unprotected"]


def losses(plan: Plan, site: Site, state: State) -> torch.Tensor:
    """Of every record under the received model, from the whole model at once."""
    model = get_plan_model(plan, "cpu")
    model.load(state)
    batch = collator(model.module, model.loaded.reader, model.device)(encoded_examples(site.dataset(plan.labels), model))
    with torch.no_grad():
        return example_losses(model.module, batch)


@pytest.mark.parametrize("train", ["head", "lora"])
def test_without_privacy_it_is_the_mean_over_the_records(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, train: str
) -> None:
    plan = make_plan(train=train, strategy=WEIGHTED)
    site = make_site()
    state = state_for(plan)
    told = train_round(plan, site, 1, state).disclosures
    assert told == {"loss": pytest.approx(float(losses(plan, site, state).mean()), rel=1e-5)}
    assert site.ledger().charges() == []


def test_under_privacy_it_has_noise_and_is_within_the_budget(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor
) -> None:
    plan = make_plan(privacy=PRIVATE, strategy=WEIGHTED, rounds=2)
    policy = tells(local_loss="noised", noise_multiplier=10.0)
    site = make_site(policy=policy)
    state = state_for(plan)
    told = [train_round(plan, site, round, state).disclosures["loss"] for round in (1, 2)]
    assert all(0 <= loss <= 4.0 for loss in told)
    charges = site.ledger().charges()
    assert [(c.purpose, c.state) for c in charges] == [("local loss", "settled"), ("training", "settled")] * 2
    assert 0.97 * 2.0 <= epsilon([c.steps for c in charges], 1e-3) <= 2.0
    assert planned_disclosures(plan, policy) == [Steps(10.0, 1.0, 2)]
    assert unprotected(site) == []


def test_it_is_charged_before_it_is_computed(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(privacy=PRIVATE, strategy=WEIGHTED)
    site = make_site(policy=tells(local_loss="noised"))

    def failing(*_: Any) -> float:
        assert [(c.purpose, c.state) for c in site.ledger().charges()] == [("local loss", "reserved")]
        raise RuntimeError("computed")

    monkeypatch.setattr(disclosures, "total_loss", failing)
    with pytest.raises(RuntimeError, match="computed"):
        train_round(plan, site, 1, state_for(plan))


def test_the_noise_is_for_one_records_ceiling(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Σ min(ℓ, 2) = 60, σ·c = 2·2 and 60 declared: mean 1 and deviation 4/60."""
    policy = tells(local_loss="noised", loss_ceiling=2.0, noise_multiplier=2.0)
    plan = make_plan(privacy={**PRIVATE, "epsilon": 50.0}, strategy=WEIGHTED, rounds=1)
    site = make_site(policy=policy)
    account = Account(plan, policy, site, site.dataset(plan.labels), generator=np.random.default_rng(0))
    account.reserve = lambda *_: 0  # type: ignore[method-assign]
    account.ledger.settle = lambda *_: None  # type: ignore[method-assign, assignment]
    teller = Disclosures(account)
    asked = []
    draws = [teller.loss(lambda c: asked.append(c) or 60.0, 60, 1)["loss"] for _ in range(4000)]  # type: ignore[func-returns-value]
    assert set(asked) == {2.0}
    assert np.mean(draws) == pytest.approx(1.0, abs=0.005)
    assert np.std(draws) == pytest.approx(4 / 60, rel=0.05)


def test_clipped_loss_sum_changes_by_the_ceiling_at_most(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """Also one whose loss is not a number, or endless."""
    plan = make_plan(strategy=WEIGHTED)
    site = make_site()
    model = get_plan_model(plan, "cpu")
    state = state_for(plan)
    model.load(state)
    setting = build_setup(plan, plan.stages[0], model, site.dataset(plan.labels), state, "clinic", expected_batch=8)
    strange = torch.cat([torch.tensor([math.nan, math.inf, 7.0, 0.5]), torch.zeros(56)])
    object.__setattr__(setting, "batches", lambda rows: [(rows, strange)])
    object.__setattr__(setting, "loss", lambda batch: batch)
    assert disclosures.total_loss(setting, 2.0) == 6.5


def test_in_the_clear_the_ledger_says_so(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, strategy=WEIGHTED)
    site = make_site(policy=tells(local_loss="clear"))
    state = state_for(plan)
    told = train_round(plan, site, 1, state).disclosures["loss"]
    assert told == pytest.approx(float(losses(plan, site, state).mean()), rel=1e-5)
    assert unprotected(site) == ["local loss"]


def test_a_policy_that_says_none_declines(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy=PRIVATE, strategy=WEIGHTED)
    site = make_site(policy=tells())
    with fails_with("policy.disclosures.local_loss") as declined:
        train_round(plan, site, 1, state_for(plan))
    assert declined.value.rule == "disclosures.local_loss"
    assert site.ledger().charges() == []
    plain = make_plan(privacy=PRIVATE)
    assert train_round(plain, site, 1, state_for(plain)).disclosures == {}


def test_a_loss_that_is_not_finite_is_said(make_plan: MakePlan, make_site: MakeSite) -> None:
    plan = make_plan(strategy=WEIGHTED)
    site = make_site()
    teller = Disclosures(Account(plan, Policy.permissive(), site, site.dataset(plan.labels)))
    with fails_with("run.loss_not_finite"):
        teller.loss(lambda c: c, 60, 1)
