"""Fisher information and Gram matrices of an organization's records against autograd and against inputs taken by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.data.tasks.classes import example_losses
from cotune.data.tasks.text import collator
from cotune.errors import PlanError
from cotune.models.encoding import encoded_examples
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, gram_layers, statistic_shapes, trained_names
from cotune.protocol.messages import decode_update, encode_update
from cotune.strategies.types import Update, apply_delta
from tests.support.failures import fails_with
from tests.support.matrix import crossed

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]


def trained(plan: Plan, site: Site, state: State) -> tuple[Update, TrainableModel, list[dict[str, Tensor]]]:
    """A round's update, the model as it was after training, and the records one by one."""
    update = train_round(plan, site, 1, state)
    model = get_plan_model(plan, "cpu")
    model.load(apply_delta(state, update.delta))
    collate = collator(model.module, model.loaded.reader, model.device)
    return update, model, [collate([example]) for example in encoded_examples(site.dataset(plan.labels), model)]


@pytest.mark.parametrize("train", ["head", "lora", "full"])
def test_fisher_is_the_mean_of_squared_gradients(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, train: str
) -> None:
    plan = make_plan(train=train, strategy={"fusion": "fisher"}, lora={"factors": "ab"})
    update, model, records = trained(plan, make_site(), state_for(plan))
    own = dict(model.parameters())
    parameters = [own[name].requires_grad_(True) for name in update.delta]
    squares = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for record in records:
        gradients = torch.autograd.grad(example_losses(model.module, record).sum(), parameters, allow_unused=True)
        for square, gradient in zip(squares, gradients, strict=True):
            square += 0 if gradient is None else gradient.double() ** 2
    assert list(update.statistics) == [f"fisher/{name}" for name in update.delta]
    for name, square in zip(update.delta, squares, strict=True):
        torch.testing.assert_close(update.statistics[f"fisher/{name}"].double(), square / 60, rtol=1e-3, atol=1e-9)
    assert sum(float(f.sum()) for f in update.statistics.values()) > 0


@pytest.mark.parametrize("train", ["head", "lora", "full"])
def test_grams_are_of_the_inputs_without_padding(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, train: str
) -> None:
    """One record at a time nothing is padded: every position counts."""
    plan = make_plan(train=train, strategy={"fusion": "regmean"}, lora={"factors": "ab"})
    update, model, records = trained(plan, make_site(), state_for(plan))
    layers = {name: layer for name, (layer, _) in gram_layers(model, update.delta).items()}
    expected: dict[str, Tensor] = {}

    def taking(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            expected[name] = expected.get(name, torch.zeros(1)) + x.T @ x / 60

        return take

    for name, layer in layers.items():
        layer.register_forward_pre_hook(taking(name))
    for record in records:
        example_losses(model.module, record)
    assert {name.removeprefix("gram/") for name in update.statistics} == set(layers)
    assert expected, "no layer saw anything"
    for name, gram in expected.items():
        found = update.statistics[f"gram/{name}"].double()
        size = len(gram)
        torch.testing.assert_close(found[:size, :size], gram, rtol=1e-3, atol=1e-4)
        with_bias = layers[name].bias is not None
        assert len(found) == size + with_bias
        if with_bias:
            assert float(found[-1, -1]) >= 1.0  # positions per record


@pytest.mark.parametrize(("fusion", "train"), crossed(["fisher", "regmean", "mean"], ["head", "lora", "full"]))
def test_they_are_what_the_server_expects_and_travel_as_they_are(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, train: str, fusion: str
) -> None:
    plan = make_plan(train=train, strategy={"fusion": fusion})
    site = make_site()
    state = state_for(plan)
    update = train_round(plan, site, 1, state)
    model = get_plan_model(plan, "cpu")
    assert {name: tuple(t.shape) for name, t in update.statistics.items()} == statistic_shapes(
        plan, model, trained_names(plan, model, 1)
    )
    assert bool(update.statistics) == (fusion != "mean")
    traveled = decode_update(encode_update(update, plan.plan_id), plan.plan_id)
    again = train_round(plan, site, 1, state)  # from the outbox
    for other in (traveled, again):
        assert other.statistics.keys() == update.statistics.keys()
        assert all(torch.equal(other.statistics[name], tensor) for name, tensor in update.statistics.items())


def test_the_model_is_left_without_hooks(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, tmp_path: Path) -> None:
    plan = make_plan(strategy={"fusion": "regmean"})
    train_round(plan, make_site(), 1, state_for(plan))
    assert not any(layer._forward_pre_hooks for layer in get_plan_model(plan, "cpu").module.modules())
    assert json.loads(plan.canonical())["strategy"]["sends"] == ["gram"]


@pytest.mark.parametrize("sends", ["fisher", "gram"])
def test_under_record_privacy_nobody_can_ask_for_them(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, sends: str
) -> None:
    """A server writes into a plan what it likes: neither as it is read nor behind that are they sent without noise."""
    private = {"epsilon": 2.0, "delta": 1e-3}
    with pytest.raises(PlanError, match="that no noise protects"):
        make_plan(privacy=private, strategy={"fusion": "mean", "sends": [sends]})
    plan = make_plan(privacy=private)
    unchecked = plan.model_copy(update={"strategy": plan.strategy.model_copy(update={"sends": (sends,)})})
    with fails_with("privacy.unprotected_statistics"):
        train_round(unchecked, make_site(), 1, state_for(plan))


def test_they_are_of_what_travels_alone(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    """What an organization keeps to itself is not told of, and the server expects nothing of it."""
    plan = make_plan(train="lora", strategy={"fusion": "fisher"}, lora={"factors": "ab", "keep": "b"})
    update = train_round(plan, make_site(), 1, state_for(plan))
    assert set(update.statistics) == {f"fisher/{name}" for name in update.delta}
