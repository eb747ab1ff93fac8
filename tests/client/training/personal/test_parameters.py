"""What an organization trains and keeps to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cotune.client.site import Site
from cotune.client.training.checks.gradient_checks import check_gradients
from cotune.client.training.personal.parameters import PERSONAL
from cotune.client.training.preparation import prepare_round
from cotune.client.training.request_context import RequestContext
from cotune.client.training.round import train_round
from cotune.client.training.stage_setup.from_records import synthetic_setup
from cotune.errors import PlanError, RunError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, shared_names, trained_names
from cotune.privacy.mechanisms.random_generators import PoissonSampler, seeded_generator
from cotune.strategies.types import apply_delta
from tests.support.failures import fails_with
from tests.support.matrix import crossed

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]

PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}


def plan_of(make_plan: MakePlan, keep: str = "b", **tables: Any) -> Plan:
    return make_plan(train="lora", lora={"rank": 2, "factors": "ab", "keep": keep}, **tables)


def base_state(plan: Plan) -> State:
    model = get_plan_model(plan, "cpu")
    model.load({})
    return model.state(shared_names(plan, model, 1))


@pytest.mark.parametrize("privacy", ["none", PRIVATE])
def test_a_travels_and_the_rest_stays(make_plan: MakePlan, make_site: MakeSite, privacy: Any) -> None:
    plan = plan_of(make_plan, privacy=privacy)
    site = make_site()
    update = train_round(plan, site, 1, base_state(plan))
    model = get_plan_model(plan, "cpu")
    assert update.delta
    assert all(".lora_A." in name for name in update.delta)
    kept = site.load_state(plan.plan_id, 1, PERSONAL)
    assert kept.keys() | update.delta.keys() == set(trained_names(plan, model, 1))
    assert {"classifier.weight", "classifier.bias"} <= kept.keys()
    after = model.state(kept)
    assert all(torch.equal(kept[name], tensor) and bool(tensor.any()) for name, tensor in after.items())


def test_alone_it_makes_no_difference_what_is_shared(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Three rounds of one organization: the same model to the bit as when it sends everything."""
    models = []
    for keep in ("b", "nothing"):
        plan = plan_of(make_plan, keep)
        site = make_site(at=keep)
        state = base_state(plan)
        for round in (1, 2, 3):
            state = apply_delta(state, train_round(plan, site, round, state, admitted=round - 1).delta)
        own = site.load_state(plan.plan_id, 3, PERSONAL) if keep == "b" else {}
        models.append({**state, **own})
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], atol=1e-6, rtol=1e-6)


def test_the_own_part_is_that_of_the_last_admitted_round(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Round 2 was trained and never entered the model: round 3 goes on from round 1."""
    plan = plan_of(make_plan)
    site = make_site(at="one")
    other = make_site(at="two")
    state = base_state(plan)
    for each in (site, other):
        train_round(plan, each, 1, state)
    train_round(plan, site, 2, state, admitted=1)
    third = train_round(plan, site, 3, state, admitted=1).delta
    expected = train_round(plan, other, 3, state, admitted=1).delta
    assert all(torch.equal(third[name], tensor) for name, tensor in expected.items())
    afresh = train_round(plan, make_site(at="three"), 3, state).delta
    assert not all(torch.equal(third[name], tensor) for name, tensor in afresh.items())


def test_another_organizations_part_is_never_used(make_plan: MakePlan, make_site: MakeSite) -> None:
    """They take turns with one model."""
    plan = plan_of(make_plan)
    state = base_state(plan)
    alone = train_round(plan, make_site(at="one"), 1, state)
    train_round(plan, make_site("bank"), 1, state)
    again = train_round(plan, make_site(at="two"), 1, state)
    assert all(torch.equal(again.delta[name], tensor) for name, tensor in alone.delta.items())


def test_looking_at_the_newest_part_leaves_those_before(make_site: MakeSite) -> None:
    """A simulation looks after a round whose update may not have been admitted."""
    site = make_site()
    assert site.load_newest_state("plan", PERSONAL) == {}
    for round in (9, 10):
        site.store_state("plan", round, {"b": torch.full((2,), float(round))}, PERSONAL, since=round)
    assert site.load_newest_state("plan", PERSONAL)["b"].tolist() == [10.0, 10.0]
    assert site.load_state("plan", 9, PERSONAL)["b"].tolist() == [9.0, 9.0]
    assert site.load_newest_state("plan") == {}  # what a client term keeps is apart
    site.load_state("plan", 10, PERSONAL)
    with fails_with("run.lost_state"):
        site.load_state("plan", 9, PERSONAL)


def test_a_lost_part_is_refused(make_plan: MakePlan, make_site: MakeSite) -> None:
    plan = plan_of(make_plan)
    site = make_site()
    with fails_with("run.lost_state", "1"):
        train_round(plan, site, 2, base_state(plan), admitted=1)


def test_where_everything_is_shared_nothing_is_kept(make_plan: MakePlan, make_site: MakeSite) -> None:
    plan = plan_of(make_plan, "nothing")
    site = make_site()
    model = get_plan_model(plan, "cpu")
    model.load({})
    train_round(plan, site, 1, model.state(trained_names(plan, model, 1)))
    assert not (site.folder / "kept").exists()


@pytest.mark.parametrize(("parts", "mode"), crossed([["head"], ["norm"], ["head", "norm"]], ["lora", "full"]))
def test_named_parts_stay_and_the_rest_travels(make_plan: MakePlan, make_site: MakeSite, parts: list[str], mode: str) -> None:
    plan = make_plan(train=mode, personal=parts, privacy=PRIVATE)
    site = make_site()
    update = train_round(plan, site, 1, base_state(plan))
    model = get_plan_model(plan, "cpu")
    kept = site.load_state(plan.plan_id, 1, PERSONAL)
    trained = set(trained_names(plan, model, 1))
    assert kept.keys() | update.delta.keys() == trained
    assert not kept.keys() & update.delta.keys()
    heads = {name for name in trained if not name.startswith(model.prefix)}
    norms = {name for name in trained if "LayerNorm" in name}
    assert kept.keys() == {*(heads if "head" in parts else ()), *(norms if "norm" in parts else ())}
    model.load({})
    assert not any(torch.equal(kept[name], base) for name, base in model.state(kept).items())  # all of it got its noise


def test_what_is_shared_follows_from_the_own_part(make_plan: MakePlan, make_site: MakeSite) -> None:
    """As in FedPer: the next round goes on from the own head of the last admitted one."""
    plan = make_plan(train="lora", personal=["head"])
    site = make_site()
    state = base_state(plan)
    state = apply_delta(state, train_round(plan, site, 1, state).delta)
    with_own = train_round(plan, site, 2, state, admitted=1).delta
    afresh = train_round(plan, make_site(at="other"), 2, state).delta
    assert any(not torch.equal(with_own[name], tensor) for name, tensor in afresh.items())


def test_another_content_of_the_kept_file_is_refused(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Nothing in it takes the place of a shared parameter, and no record was charged for."""
    plan = make_plan(train="lora", personal=["head"], privacy=PRIVATE)
    site = make_site()
    state = base_state(plan)
    train_round(plan, site, 1, state)
    charges = len(site.ledger().charges())
    kept = site.load_state(plan.plan_id, 1, PERSONAL)
    broken = {
        "foreign": {**kept, next(iter(state)): torch.zeros(next(iter(state.values())).shape)},
        "shape": {**kept, "classifier.bias": torch.zeros(7)},
        "not finite": {**kept, "classifier.bias": kept["classifier.bias"] + float("nan")},
    }
    for content in broken.values():
        site.store_state(plan.plan_id, 1, content, PERSONAL)
        with pytest.raises(RunError) as refused:
            train_round(plan, site, 2, state, admitted=1)
        assert refused.value.code == "run.lost_state"
        assert len(site.ledger().charges()) == charges


# --- an own adapter beside the shared one


def adapter_plan(make_plan: MakePlan, **tables: Any) -> Plan:
    return make_plan(train="lora", lora={"rank": 2, "factors": "ab"}, **{"personal": ["adapter"], **tables})


@pytest.mark.parametrize("privacy", ["none", PRIVATE], ids=["without privacy", "with privacy"])
def test_own_adapter_stays_and_the_shared_one_travels(make_plan: MakePlan, make_site: MakeSite, privacy: Any) -> None:
    plan = adapter_plan(make_plan, privacy=privacy)
    site = make_site()
    update = train_round(plan, site, 1, base_state(plan))
    kept = site.load_state(plan.plan_id, 1, PERSONAL)
    assert kept.keys() == {n.replace(".default.", ".own.") for n in update.delta if ".lora_" in n}
    assert all(bool(tensor.any()) for name, tensor in kept.items() if ".lora_B." in name)
    assert {"classifier.weight", "classifier.bias"} <= update.delta.keys()


def test_model_with_two_adapters_adds_both_products(make_plan: MakePlan) -> None:
    plan = adapter_plan(make_plan)
    model = get_plan_model(plan, "cpu")
    generator = torch.Generator().manual_seed(1)
    names = model.adapter_names()
    model.load({n: torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()})
    state = model.state(name for name, _ in model.parameters())
    adapter = model.adapters()[0]
    layer = model.module.get_submodule(adapter.weight.removesuffix(".weight"))
    x = torch.randn(3, state[adapter.a].shape[1], generator=generator)
    own = {name: name.replace(".default.", ".own.") for name in (adapter.a, adapter.b)}
    weight = state[adapter.weight] + adapter.scale * (
        state[adapter.b] @ state[adapter.a] + state[own[adapter.b]] @ state[own[adapter.a]]
    )
    expected = x @ weight.T + state[adapter.weight.replace(".weight", ".bias")]
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_gradients_with_two_adapters_are_those_of_single_records(make_plan: MakePlan) -> None:
    """One clip norm over both: the plan's own check compares the clipped sum with a loop over records."""
    plan = adapter_plan(make_plan, privacy=PRIVATE)
    model = get_plan_model(plan, "cpu")
    model.load({})
    (stage,) = plan.stages
    model.train_only(trained_names(plan, model, 1))
    error = check_gradients(synthetic_setup(plan, stage, model, 3), plan.privacy, stage.mode)  # type: ignore[arg-type]
    assert error < 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": "full"}, "stands beside a shared one"),
        ({"lora": {"smaller_ranks": True}}, "an own adapter has the plan's rank"),
        ({"strategy": "flora"}, "is about whole models"),
        ({"lora": {"keep": "b"}}, "keeps B and the head already"),
    ],
)
def test_plans_that_an_own_adapter_cannot_have(make_plan: MakePlan, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said) as refused:
        make_plan(**{"train": "lora", "lora": {"rank": 2, "factors": "ab"}, "personal": ["adapter"], **changes})
    assert refused.value.code == "plan.invalid"


# --- FedRep's order


def test_own_part_is_trained_first_and_then_held(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Algorithm 1: the head goes as if it trained alone, and the representation as if the head stood there already."""
    local = {"steps": 3, "momentum": 0.0}
    plan = make_plan(train="lora", personal={"parts": ["head"], "order": "own_first", "own_steps": 2}, local=local)
    site = make_site(at="fedrep")
    state = base_state(plan)
    update = train_round(plan, site, 1, state)
    assert update.steps == 3
    head = site.load_state(plan.plan_id, 1, PERSONAL)
    model = get_plan_model(plan, "cpu")
    model.load({**state, **head})
    setup_plan = make_plan(train="lora", local=local)
    held = train_only_shared(setup_plan, make_site(at="by hand"), {**state, **head})
    assert update.delta.keys() == held.keys()
    for name, tensor in held.items():
        torch.testing.assert_close(update.delta[name], tensor, atol=1e-6, rtol=1e-5)


def train_only_shared(plan: Plan, site: Site, state: State) -> dict[str, torch.Tensor]:
    """Plain steps on what is not the head, on the batches of the round, by autograd."""
    model = get_plan_model(plan, "cpu")
    context = RequestContext(plan, site, site.policy(), 1, state)
    prepared = prepare_round(context)
    names = [name for name in prepared.parameters if name.startswith(model.prefix)]
    parameters = model.train_only(names)
    optimizer = torch.optim.SGD(parameters, lr=context.stage.local.learning_rate)
    rate = context.stage.local.sample_rate(context.examples)
    generator = seeded_generator(plan.seed, "batches", site.organization, 1)
    for batch in PoissonSampler(prepared.setup.rows, rate, 3, generator):
        optimizer.zero_grad()
        for _, rows in prepared.setup.batches(batch):
            (prepared.setup.loss(rows).sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
        if batch:
            optimizer.step()
    after = model.state(names)
    return {name: after[name] - state[name] for name in names}


@pytest.mark.parametrize(("given", "expected"), [({}, 6), ({"own_steps": 2}, 5)])
def test_steps_on_the_own_part_are_charged(
    make_plan: MakePlan, make_site: MakeSite, given: dict[str, int], expected: int
) -> None:
    personal = {"parts": ["head"], "order": "own_first", **given}
    plan = make_plan(train="lora", personal=personal, privacy=PRIVATE, local={"steps": 3})
    site = make_site()
    update = train_round(plan, site, 1, base_state(plan))
    [charge] = [charge for charge in site.ledger().charges() if charge.purpose == "training"]
    assert (update.steps, charge.steps.count, charge.state) == (3, expected, "settled")
    assert update.epsilon is not None
    assert update.epsilon <= PRIVATE["epsilon"]
