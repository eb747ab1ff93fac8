"""An organization that trains a smaller rank than the plan's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cotune.client.consent.policy_check import check_consent
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, trained_names
from cotune.privacy.mechanisms import dp_sgd
from cotune.privacy.policy import Policy
from tests.support.failures import fails_with
from tests.support.matrix import crossed

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]

PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}
RANK = 8


def plan_of(make_plan: MakePlan, factors: str = "ab", **tables: Any) -> Plan:
    return make_plan(train="lora", lora={"rank": RANK, "alpha": 16.0, "factors": factors, "smaller_ranks": True}, **tables)


def state_of(plan: Plan, round: int = 1) -> State:
    """What is trained, with a B that is not 0, as after a few rounds."""
    model = get_plan_model(plan, "cpu")
    model.load({})
    rng = torch.Generator().manual_seed(0)
    state = model.state(trained_names(plan, model, round))
    return {n: 0.1 * torch.randn(t.shape, generator=rng) if ".lora_B." in n else t for n, t in state.items()}


def trained(
    make_plan: MakePlan, make_site: MakeSite, rank: int | None, *, factors: str = "ab", round: int = 1, **tables: Any
) -> Any:
    """(model after the round, the state that was sent, the delta that came back)."""
    plan = plan_of(make_plan, factors, **tables)
    state = state_of(plan, round)
    site = make_site(at=f"rank-{rank}", policy=Policy.permissive(rank=rank))
    update = train_round(plan, site, round, state)
    return get_plan_model(plan, "cpu"), state, update.delta


def frozen_a(plan: Plan) -> State:
    """Every A as it was drawn."""
    model = get_plan_model(plan, "cpu")
    model.load({})
    return model.state(adapter.a for adapter in model.adapters())


def first(name: str, tensor: Tensor, rank: int) -> Tensor:
    return tensor[:rank] if ".lora_A." in name else tensor[:, :rank] if ".lora_B." in name else tensor


@pytest.mark.parametrize(
    ("trained_in", "optimizer", "privacy"),
    crossed([("b", 1), ("ab", 1), ("alternate", 1), ("alternate", 2)], ["sgd", "adamw"], ["none", PRIVATE]),
)
def test_only_the_first_slices_move_and_travel(
    make_plan: MakePlan, make_site: MakeSite, trained_in: tuple[str, int], optimizer: str, privacy: Any
) -> None:
    factors, round = trained_in
    local = {"optimizer": optimizer, "learning_rate": 0.1, "weight_decay": 0.1}
    model, state, delta = trained(make_plan, make_site, 3, factors=factors, round=round, privacy=privacy, local=local)
    assert delta.keys() == state.keys()
    after = model.state([n for n, _ in model.parameters() if ".lora_" in n])
    for name, tensor in state.items():
        held = first(name, tensor, 3)
        assert delta[name].shape == held.shape
        assert bool(delta[name].any())
    for name, tensor in after.items():
        kept = first(name, tensor, 3)
        assert float(tensor.abs().sum()) == pytest.approx(float(kept.abs().sum()))  # everything else is 0
        if name in state:
            torch.testing.assert_close(kept, first(name, state[name], 3) + delta[name])


def test_it_is_the_training_of_a_model_that_has_the_smaller_rank(make_plan: MakePlan, make_site: MakeSite) -> None:
    """The same records, batches and s: what the other slices would have been changes nothing."""
    _, state, delta = trained(make_plan, make_site, 3)
    plan = make_plan(train="lora", lora={"rank": 3, "alpha": 6.0, "factors": "ab"})  # s = 2, as 16 / 8
    small = train_round(plan, make_site(at="small"), 1, {n: first(n, t, 3).contiguous() for n, t in state.items()})
    for name, tensor in small.delta.items():
        torch.testing.assert_close(delta[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("factors", "clipping"), crossed(["b", "ab"], ["flat", "per_layer"]))
def test_clipping_sees_the_slices_that_are_held_alone(
    make_plan: MakePlan, make_site: MakeSite, factors: str, clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DP-SGD on all records, its noise left out: the clipped sums are those of a model that has the smaller rank."""
    monkeypatch.setattr(dp_sgd, "add_gaussian_noise", lambda total, *_: total)
    tables = {"privacy": {**PRIVATE, "clip_norm": 0.1, "clipping": clipping}, "local": {"batch_size": 60, "steps": 2}}
    _, state, delta = trained(make_plan, make_site, 3, factors=factors, **tables)
    plan = make_plan(train="lora", lora={"rank": 3, "alpha": 6.0, "factors": factors}, **tables)
    sent = {n: first(n, t, 3).contiguous() for n, t in {**frozen_a(plan_of(make_plan, factors)), **state}.items()}
    small = train_round(plan, make_site(at="small"), 1, sent)
    for name, tensor in small.delta.items():
        assert bool(tensor.any())
        torch.testing.assert_close(delta[name], tensor, atol=1e-6, rtol=1e-3)


def test_a_rank_like_the_plans_or_larger_changes_nothing(make_plan: MakePlan, make_site: MakeSite) -> None:
    plain = trained(make_plan, make_site, None)[2]
    for rank in (RANK, 100):
        delta = trained(make_plan, make_site, rank)[2]
        assert all(torch.equal(delta[name], tensor) for name, tensor in plain.items())


def test_other_stages_are_trained_whole(make_plan: MakePlan, make_site: MakeSite) -> None:
    stages = [{"mode": "lora", "rounds": 1}, {"mode": "full", "rounds": 1}]
    plan = make_plan(train=stages, lora={"rank": 8, "smaller_ranks": True})
    model: TrainableModel = get_plan_model(plan, "cpu")
    model.load({})
    state = model.state([*model.names("lora"), *model.names("full")])
    state = {n: torch.ones_like(t) if ".lora_B." in n else t for n, t in state.items()}
    train_round(plan, make_site(policy=Policy.permissive(rank=3)), 2, state)
    for name, tensor in model.state([n for n in state if ".lora_B." in n]).items():
        assert torch.equal(tensor, state[name])


def test_a_plan_that_takes_no_smaller_ranks_is_declined(make_plan: MakePlan) -> None:
    policy = Policy.permissive(rank=3)
    with fails_with("policy.training.own_rank", "training.own_rank", "8", "lora.smaller_ranks"):
        check_consent(make_plan(train="lora", lora={"rank": 8}), policy, 60)
    check_consent(make_plan(train="lora", lora={"rank": 3}), policy, 60)
    check_consent(make_plan(train="head", lora={"rank": 8}), policy, 60)
    check_consent(plan_of(make_plan), policy, 60)
