"""An organization's own copy of the model (Ditto): pulled toward the shared one, which never reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cotune.client.consent.policy_check import find_violations
from cotune.client.site import Site
from cotune.client.training.personal import ditto_pfedme
from cotune.client.training.personal.ditto_pfedme import open_personal
from cotune.client.training.personal.parameters import PERSONAL
from cotune.client.training.round import train_round
from cotune.errors import PlanError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, shared_names, trained_names
from cotune.privacy.policy import Policy, change_policy
from cotune.strategies.types import apply_delta
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}
UNNOISED = {"method": "ditto", "noise": False}


def base_state(plan: Plan) -> State:
    model = get_plan_model(plan, "cpu")
    model.load({})
    return model.state(shared_names(plan, model, 1))


def copy_of(plan: Plan, site: Site, round: int) -> State:
    return site.load_state(plan.plan_id, round, PERSONAL)


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_shared_update_is_the_same_with_and_without_a_copy(make_plan: MakePlan, make_site: MakeSite, mode: str) -> None:
    """To the bit, in rounds that go on from a copy, too: nothing of it reaches what leaves."""
    deltas = []
    for personal in ("ditto", []):
        plan = make_plan(train=mode, personal=personal)
        site = make_site(at=f"site-{bool(personal)}")
        state = base_state(plan)
        for round in (1, 2):
            update = train_round(plan, site, round, state, admitted=round - 1)
            state = apply_delta(state, update.delta)
        deltas.append(update.delta)
    assert deltas[0].keys() == deltas[1].keys()
    assert all(torch.equal(tensor, deltas[1][name]) for name, tensor in deltas[0].items())


def test_copy_is_all_parameters_from_the_last_admitted_round(make_plan: MakePlan, make_site: MakeSite) -> None:
    plan = make_plan(personal="ditto")
    site = make_site()
    state = base_state(plan)
    train_round(plan, site, 1, state)
    first = copy_of(plan, site, 1)
    assert first.keys() == set(trained_names(plan, get_plan_model(plan, "cpu"), 1))
    train_round(plan, site, 2, state, admitted=1)
    second = copy_of(plan, site, 2)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    train_round(plan, site, 3, state, admitted=1)  # round 2 never entered the model
    assert copy_of(plan, site, 3).keys() == first.keys()


def test_one_step_of_the_copy_is_that_of_the_paper(make_plan: MakePlan, make_site: MakeSite) -> None:
    """v − η(∇F(v) + λ(v − w)): of two pulls on the same batch, the difference is η(λ₁ − λ₂)(v − w)."""
    found = {}
    for pull in (0.0, 0.5):
        plan = make_plan(personal={"method": "ditto", "pull": pull}, local={"steps": 1, "learning_rate": 0.1, "momentum": 0.0})
        site = make_site(at=f"pull-{pull}")
        state = base_state(plan)
        train_round(plan, site, 1, state)
        first = copy_of(plan, site, 1)
        elsewhere = {name: tensor + 1.0 for name, tensor in state.items()}  # w has moved away from v
        train_round(plan, site, 2, elsewhere, admitted=1)
        found[pull] = (first, copy_of(plan, site, 2), elsewhere)
    first, plain, toward = found[0.0]
    _, pulled, _ = found[0.5]
    for name in plain:
        torch.testing.assert_close(pulled[name] - plain[name], -0.1 * 0.5 * (first[name] - toward[name]), atol=1e-5, rtol=1e-4)


def test_steps_with_noise_are_charged_and_those_without_are_not(make_plan: MakePlan, make_site: MakeSite) -> None:
    counts = {}
    noise = {}
    for name, personal in (("none", []), ("noised", "ditto"), ("unnoised", UNNOISED)):
        plan = make_plan(personal=personal, privacy=PRIVATE, local={"steps": 3})
        site = make_site(at=name)
        update = train_round(plan, site, 1, base_state(plan))
        assert update.steps == 3
        [charge] = [charge for charge in site.ledger().charges() if charge.purpose == "training"]
        counts[name] = charge.steps.count
        noise[name] = charge.steps.noise_multiplier
        assert update.epsilon is not None
        assert update.epsilon <= 2.0
    assert counts == {"none": 3, "noised": 6, "unnoised": 3}
    assert noise["noised"] > noise["none"] == noise["unnoised"]


def test_a_copy_that_diverges_is_dropped_and_nobody_is_told(make_plan: MakePlan, make_site: MakeSite) -> None:
    """A refusal would reveal something about records that no noise protects."""
    plan = make_plan(personal=UNNOISED, privacy=PRIVATE)
    site = make_site()
    model = get_plan_model(plan, "cpu")
    state = base_state(plan)
    copy = open_personal(plan, site, model, 1, 0)
    assert isinstance(copy, ditto_pfedme.OwnCopy)
    model.load(state)
    with copy.in_place(state) as parameters, torch.no_grad():
        next(iter(parameters.values())).fill_(float("nan"))
    assert copy.kept == {}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state(state).items())


def test_policy_allows_a_copy_without_noise_or_declines_it(make_plan: MakePlan) -> None:
    plan = make_plan(personal=UNNOISED, privacy=PRIVATE)
    strict = change_policy(Policy.permissive(), {"training.personal_without_noise": False})
    assert [each.rule for each in find_violations(plan, strict, 60)] == ["training.personal_without_noise"]
    assert not list(find_violations(plan, Policy.permissive(), 60))
    assert not list(find_violations(make_plan(personal="ditto", privacy=PRIVATE), strict, 60))


@pytest.mark.parametrize(
    "personal",
    [
        {"parts": ["head"], "noise": False},
        {"parts": ["norm"], "noise": False},
        {"parts": ["adapter"], "noise": False},
        {"parts": ["head"], "order": "own_first", "noise": False},
        {"method": "pfedme", "noise": False},
    ],
)
def test_parameters_read_by_shared_gradients_need_noise(make_plan: MakePlan, personal: dict[str, Any]) -> None:
    """See tests/privacy/mechanisms/test_personal_leak.py for what would leak."""
    with fails_with("plan.invalid", "personal.noise") as refused:
        make_plan(train="lora", personal=personal, privacy=PRIVATE)
    assert refused.value.code == "plan.invalid"
    make_plan(train="lora", personal=personal)  # without privacy there is nothing to keep


def pfedme(**keys: Any) -> dict[str, Any]:
    return {"method": "pfedme", **keys}


def test_without_pull_the_copy_is_plain_training_and_is_followed(make_plan: MakePlan, make_site: MakeSite) -> None:
    """pFedMe with λ = 0 and one move the whole way is FedAvg, and with a part of the way that part of its update."""
    local = {"steps": 4, "momentum": 0.0}
    plan = make_plan(local=local)
    state = base_state(plan)
    plain = train_round(plan, make_site(at="plain"), 1, state).delta
    for move in (1.0, 0.25):
        plan = make_plan(personal=pfedme(pull=0.0, inner_steps=4, move=move), local=local)
        site = make_site(at=f"move-{move}")
        update = train_round(plan, site, 1, state)
        assert update.steps == 4
        own = copy_of(plan, site, 1)
        for name, tensor in plain.items():
            torch.testing.assert_close(update.delta[name], move * tensor, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(own[name] - state[name], tensor, atol=1e-6, rtol=1e-5)


def test_copy_is_pulled_toward_where_the_shared_model_has_gone(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Of two steps with K = 1, by hand: w₁ = w₀ + m(θ₁ − w₀), θ₂ = θ₁ − η(g₂ + λ(θ₁ − w₁)), and the last move follows."""
    found = {}
    for pull in (0.0, 0.5):
        plan = make_plan(
            personal=pfedme(pull=pull, inner_steps=1, move=0.25), local={"steps": 2, "learning_rate": 0.1, "momentum": 0.0}
        )
        site = make_site(at=f"pull-{pull}")
        state = base_state(plan)
        update = train_round(plan, site, 1, state)
        found[pull] = (update.delta, copy_of(plan, site, 1))
    one = make_plan(
        personal=pfedme(pull=0.0, inner_steps=1, move=0.25), local={"steps": 1, "learning_rate": 0.1, "momentum": 0.0}
    )
    site = make_site(at="one step")
    train_round(one, site, 1, state)
    first = copy_of(one, site, 1)  # θ₁: the batches of a round begin alike
    for name, tensor in state.items():
        followed = tensor + 0.25 * (first[name] - tensor)
        by_pull = -0.1 * 0.5 * (first[name] - followed)
        torch.testing.assert_close(found[0.5][1][name] - found[0.0][1][name], by_pull, atol=1e-6, rtol=1e-3)
        expected = followed + 0.25 * (found[0.5][1][name] - followed) - tensor
        torch.testing.assert_close(found[0.5][0][name], expected, atol=1e-6, rtol=1e-3)


def test_steps_of_a_followed_copy_are_charged_once(make_plan: MakePlan, make_site: MakeSite) -> None:
    counts = []
    for personal in ([], pfedme(inner_steps=2)):
        plan = make_plan(personal=personal, privacy=PRIVATE, local={"steps": 3})
        site = make_site(at=f"site-{bool(personal)}")
        train_round(plan, site, 1, base_state(plan))
        [charge] = [charge for charge in site.ledger().charges() if charge.purpose == "training"]
        counts.append((charge.steps.count, charge.steps.noise_multiplier))
    assert counts[0] == counts[1]


def test_copy_starts_as_the_shared_model_in_every_round(make_plan: MakePlan, make_site: MakeSite) -> None:
    """What is sent does not follow from what was kept, which may be of a round that never entered the model."""
    plan = make_plan(personal=pfedme(inner_steps=2))
    site = make_site(at="one")
    state = base_state(plan)
    train_round(plan, site, 1, state)
    later = train_round(plan, site, 2, state, admitted=1).delta
    afresh = train_round(plan, make_site(at="two"), 2, state).delta
    assert all(torch.equal(later[name], tensor) for name, tensor in afresh.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"personal": pfedme(), "strategy": {"client_term": {"name": "proximal", "mu": 0.1}}}, "expected one of the two"),
        (
            {"personal": pfedme(), "privacy": PRIVATE, "strategy": {"weighting": "noise_aware"}},
            "knows the noise of plain steps",
        ),
        (
            {"personal": pfedme(), "train": "lora", "lora": {"smaller_ranks": True}},
            "an own copy of the model has the plan's rank",
        ),
        ({"personal": {"method": "ditto", "order": "own_first"}}, "is for parts"),
        ({"personal": pfedme(own_steps=3)}, "own_steps = 3 is for"),
    ],
)
def test_plans_that_a_copy_cannot_have(make_plan: MakePlan, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said) as refused:
        make_plan(**changes)
    assert refused.value.code == "plan.invalid"
