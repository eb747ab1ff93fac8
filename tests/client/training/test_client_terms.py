"""Client terms inside of a round: where they act, that they cost no privacy, and what is kept for the next round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.errors import RunError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.mechanisms import dp_sgd
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]

ONE_STEP = {"batch_size": 60, "steps": 1, "learning_rate": 0.5}  # all records: nothing random but the noise
PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}


def constant(state: State, value: float) -> State:
    return {name: torch.full_like(tensor, value) for name, tensor in state.items()}


@pytest.mark.parametrize("train", ["head", "lora", "full"])
def test_term_is_added_after_clipping_and_noise(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A c of 100 everywhere moves every parameter by −η·100; the clipped sum and its noise are the same to rounding."""
    monkeypatch.setattr(dp_sgd, "private_generator", lambda: np.random.default_rng(0))  # the same noise both times
    plan = make_plan(train=train, privacy=PRIVATE, local=ONE_STEP, strategy="scaffold")
    state = state_for(plan)
    sites = [make_site(at=at) for at in ("with", "without")]
    moved, plain = (
        train_round(plan, site, 1, state, sent=sent).delta for site, sent in zip(sites, (constant(state, 100.0), {}), strict=True)
    )
    for name, tensor in plain.items():
        assert float(tensor.abs().max()) > 1e-3
        torch.testing.assert_close(moved[name], tensor - 50.0, rtol=0, atol=2e-5)
    with_term, without = (site.ledger().charges() for site in sites)
    assert [c.steps for c in with_term] == [c.steps for c in without]


def test_the_proximal_term_pulls_back_in_every_step(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """With η·μ = 1 each step forgets those before it: the round moves by its last gradient alone."""
    local = {"batch_size": 60, "learning_rate": 0.5, "steps": 3}
    plan = make_plan(local=local, strategy={"client_term": {"name": "proximal", "mu": 2.0}})
    free = make_plan(local=local)
    state = state_for(plan)
    pulled, far = (train_round(p, make_site(at=at), 1, state).delta for p, at in ((plan, "a"), (free, "b")))
    sizes = [float(sum(d.double().pow(2).sum() for d in delta.values())) ** 0.5 for delta in (pulled, far)]
    assert 0 < sizes[0] < 0.5 * sizes[1]


def kept_of(site: Site) -> list[str]:
    return sorted(path.name for path in site.folder.glob("kept/*/*"))


def test_the_next_round_goes_on_from_the_last_admitted_update(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor
) -> None:
    """Round 2 came too late and was never admitted: round 3 is what it would have been without round 2."""
    plan = make_plan(rounds=5, strategy="feddyn")
    state = state_for(plan)
    late = make_site(at="late")
    punctual = make_site(at="punctual")
    for site in (late, punctual):
        train_round(plan, site, 1, state)
    train_round(plan, late, 2, state, admitted=1)
    assert kept_of(late) == ["round-00001.safetensors", "round-00002.safetensors"]
    third, expected = (train_round(plan, site, 3, state, admitted=1).delta for site in (late, punctual))
    assert all(torch.equal(third[name], expected[name]) for name in expected)
    train_round(plan, late, 4, state, admitted=3)
    train_round(plan, late, 5, state, admitted=4)
    assert kept_of(late) == [f"round-0000{round}.safetensors" for round in (3, 4, 5)]


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_server_can_go_on_from_its_checkpoint_before_the_last(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, strategy: str
) -> None:
    """Round 3 was admitted and round 4 asked for when the checkpoint of round 3 turned out to be damaged: round 3 is asked for
    again, going on from round 1, as round 2 came too late.
    """
    plan = make_plan(rounds=4, strategy=strategy)
    site = make_site()
    states = [state_for(plan), {name: tensor + 0.5 for name, tensor in state_for(plan).items()}]
    train_round(plan, site, 1, states[0])
    train_round(plan, site, 2, states[0], admitted=1)
    third = train_round(plan, site, 3, states[0], admitted=1).delta
    train_round(plan, site, 4, states[1], admitted=3)
    again = train_round(plan, site, 3, states[0], admitted=1).delta
    assert all(torch.equal(again[name], tensor) for name, tensor in third.items())


@pytest.mark.parametrize("privacy", ["none", PRIVATE])
def test_crash_before_the_outbox_keeps_both_sides_in_step(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, privacy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is that of the update that was handed over, not of the one that was lost; a resend finds both unchanged."""
    plan = make_plan(privacy=privacy, strategy="feddyn")
    site = make_site()
    state = state_for(plan)
    alpha = 0.1
    with monkeypatch.context() as patch:
        patch.setattr(Site, "store_update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_round(plan, site, 1, state)
    assert kept_of(site) == ["round-00001.safetensors"]
    update = train_round(plan, site, 1, state)
    again = train_round(plan, site, 1, state)
    kept = site.load_state(plan.plan_id, 1)
    for name, d in update.delta.items():
        torch.testing.assert_close(kept[name], -alpha * d.double(), rtol=1e-12, atol=0)
        assert torch.equal(again.delta[name], d)


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_without_what_was_kept_there_is_no_round(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, harm: str
) -> None:
    plan = make_plan(strategy="scaffold")
    site = make_site()
    state = state_for(plan)
    train_round(plan, site, 1, state)
    (file,) = site.folder.glob("kept/*/*")
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40])
    with fails_with("run.lost_state", "1"):
        train_round(plan, site, 2, state, admitted=1)


def test_a_term_without_state_keeps_nothing(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(strategy="fedprox")
    site = make_site()
    train_round(plan, site, 1, state_for(plan))
    assert kept_of(site) == []


WRONG: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "not finite": (lambda t: torch.full_like(t, float("nan")), "expected"),
    "another shape": (lambda t: torch.ones(7, *t.shape), "expected a parameter of the state, in its shape"),
    "one number for all": (lambda t: torch.ones(1), "expected a parameter of the state, in its shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_beside_the_state_are_checked_before_the_charge(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, wrong: str
) -> None:
    plan = make_plan(privacy=PRIVATE, strategy="scaffold")
    site = make_site()
    state, (made, said) = state_for(plan), WRONG[wrong]
    with pytest.raises(RunError, match=said):
        train_round(plan, site, 1, state, sent={name: made(tensor) for name, tensor in state.items()})
    with fails_with("run.wrong_state", "nobody.weight"):
        train_round(plan, site, 1, state, sent={"nobody.weight": torch.zeros(2)})
    assert site.ledger().charges() == []


@pytest.mark.parametrize("admitted", [-1, 2, 3, 10**12])
def test_only_an_earlier_round_can_be_the_last_admitted_one(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, admitted: int
) -> None:
    """Going on from a later one would forget the earlier ones, which the model counts on."""
    plan = make_plan(strategy="scaffold")
    site = make_site()
    state = state_for(plan)
    train_round(plan, site, 1, state)
    with fails_with("run.wrong_round", str(admitted)):
        train_round(plan, site, 2, state, admitted=admitted)
    assert kept_of(site) == ["round-00001.safetensors"]
