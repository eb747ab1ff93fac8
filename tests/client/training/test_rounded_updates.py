"""An update is rounded once, after its noise, onto the values that travel: what is kept, checked and sent is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.errors import RunError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.wire import Codec
from cotune.protocol.codecs import pack, round_to, rounding_generator
from cotune.protocol.messages import received_digest
from cotune.strategies.types import Delta

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}
LOSSY: list[Codec] = ["bfloat16", "int8", "int4"]


def same(one: Delta, other: Delta) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("codec", LOSSY)
def test_an_update_is_the_exact_one_rounded(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, codec: Codec) -> None:
    """Training itself does not change, nor what is said beside the delta."""
    exact = make_plan(train="full")
    plan = make_plan(train="full", wire=codec)
    state = state_for(exact)
    trained = train_round(exact, make_site(at="one"), 1, state)
    update = train_round(plan, make_site(at="two"), 1, state)
    wanted = {n: round_to(codec, t, rounding_generator(plan.seed, "clinic", 1, n)) for n, t in trained.delta.items()}
    assert same(update.delta, wanted)
    assert not same(update.delta, trained.delta)
    assert replace(update, delta={}) == replace(trained, delta={})


@pytest.mark.parametrize("codec", LOSSY)
def test_private_update_is_encodable_with_the_same_epsilon(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, codec: Codec
) -> None:
    """Rounding comes after the noise: it is post-processing, and is charged nothing."""
    exact = make_plan(privacy=PRIVATE)
    plan = make_plan(privacy=PRIVATE, wire=codec)
    state = state_for(exact)
    site = make_site(at="two")
    update = train_round(plan, site, 1, state)
    for tensor in update.delta.values():
        pack(codec, tensor)
    assert update.epsilon == train_round(exact, make_site(at="one"), 1, state).epsilon
    kept = site.finished_update(plan.plan_id, 1, received_digest(state))
    assert kept is not None
    assert same(kept.delta, update.delta)


def test_site_killed_before_storing_repeats_its_update(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(wire="int4")
    state = state_for(plan)
    site = make_site()
    first = train_round(plan, site, 1, state)
    shutil.rmtree(site.outbox.parent)
    assert same(train_round(plan, site, 1, state).delta, first.delta)


def test_rounding_differs_by_round_and_organization(make_plan: MakePlan) -> None:
    plan = make_plan(wire="int4")
    drawn = [
        rounding_generator(plan.seed, organization, round, name).random(4).tolist()
        for organization in ("clinic", "bank")
        for round in (1, 2)
        for name in ("a", "b")
    ]
    assert len({tuple(each) for each in drawn}) == len(drawn)


def test_what_a_client_term_keeps_is_of_what_was_sent(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """SCAFFOLD's new control is c_k − c − Δ / (K·η): the server computes the same from what it got."""
    plan = make_plan(wire="int4", strategy="scaffold", local={"momentum": 0.0})
    state = state_for(plan)
    site = make_site()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    update = train_round(plan, site, 1, state, sent=zeros)
    local = plan.stages[0].local
    assert local.steps is not None
    kept = site.load_state(plan.plan_id, 1)
    for name, tensor in update.delta.items():
        torch.testing.assert_close(kept[name], -tensor.double() / (local.steps * local.learning_rate))


def test_values_that_cannot_be_written_are_not_sent(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite, and rounded up they would not be."""
    plan = make_plan(wire="int8")
    largest = {name: torch.full_like(t, torch.finfo(torch.float32).max) for name, t in state_for(plan).items()}
    monkeypatch.setattr("cotune.client.training.round.difference", lambda new, old: largest)
    site = make_site()
    with pytest.raises(RunError) as caught:
        train_round(plan, site, 1, state_for(plan))
    assert caught.value.code == "run.not_encodable"
    assert not site.outbox.exists()
