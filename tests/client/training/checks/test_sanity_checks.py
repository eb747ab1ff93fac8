from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cotune.client.training.checks.sanity_checks import SanityChecks
from cotune.errors import RunError
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.mechanisms.dp_sgd import StepReport
from tests.support.failures import fails_with

FIRST = StepReport(1, 4, 0.7)
SECOND = StepReport(2, 4, 0.7)


@pytest.fixture
def model(make_plan: Callable[..., Plan]) -> TrainableModel:
    return get_plan_model(make_plan(train="lora"), "cpu")


def guard(model: TrainableModel, *, noise: bool = True, thorough: bool = True, at_once: int = 7) -> SanityChecks:
    before = model.state(model.names("lora"))
    watching = SanityChecks(model, before, noise=noise, thorough=thorough, summed_at_once=at_once)
    watching.begin()
    return watching


@torch.no_grad()
def move(model: TrainableModel, *names: str) -> None:
    own = dict(model.parameters())
    for name in names:
        own[name].view(-1)[0] += 1e-3


def test_all_that_is_shared_may_move(model: TrainableModel) -> None:
    watching = guard(model)
    move(model, *model.names("lora"))
    watching.after_step(FIRST)
    watching.after_round()


@pytest.mark.parametrize("thorough", [False, True])
def test_a_frozen_parameter_must_not_move(model: TrainableModel, thorough: bool) -> None:
    watching = guard(model, thorough=thorough)
    frozen = next(name for name, _ in model.parameters() if ".lora_A." in name)
    move(model, frozen, *model.names("lora"))
    with fails_with("run.frozen_parameter_changed", frozen) as raised:
        watching.after_step(FIRST)
    assert raised.value.code == "run.frozen_parameter_changed"


def test_a_frozen_parameter_must_not_be_replaced(model: TrainableModel) -> None:
    watching = guard(model, thorough=False)
    move(model, *model.names("lora"))
    _, parameter = next((n, p) for n, p in model.parameters() if n.startswith(model.prefix) and ".lora_" not in n)
    parameter.data = parameter.data.clone()
    with pytest.raises(RunError):
        watching.after_step(FIRST)


@pytest.mark.parametrize("at_once", [1, 7, 2**22])
def test_a_change_past_the_counters_shows_at_the_end(model: TrainableModel, at_once: int) -> None:
    """The least one that there is, made through memory that is shared, of which PyTorch learns nothing."""
    watching = guard(model, at_once=at_once)
    move(model, *model.names("lora"))
    name, parameter = next((n, p) for n, p in model.parameters() if n.startswith(model.prefix) and ".lora_" not in n)
    flat = parameter.detach().numpy().reshape(-1)
    flat[-1] = np.nextafter(flat[-1], np.float32(np.inf))
    watching.after_step(FIRST)
    with fails_with("run.frozen_parameter_changed", name):
        watching.after_round()
    flat[-1] = np.nextafter(flat[-1], np.float32(-np.inf))


def test_a_buffer_must_not_change(model: TrainableModel) -> None:
    model.module.register_buffer("running", torch.zeros(3), persistent=False)
    watching = guard(model, thorough=False)
    move(model, *model.names("lora"))
    model.module.get_buffer("running").numpy()[1] = 1.0
    with fails_with("run.frozen_parameter_changed", "running"):
        watching.after_step(FIRST)
    model.module._buffers.pop("running")


@pytest.mark.parametrize("change", ["written", "replaced"])
def test_a_large_buffer_must_not_change(model: TrainableModel, change: str) -> None:
    """It is watched as frozen parameters are: no checksum is taken of it in the first step."""
    model.module.register_buffer("map", torch.zeros(2**16 + 1), persistent=False)
    watching = guard(model, thorough=False)
    move(model, *model.names("lora"))
    if change == "written":
        model.module.get_buffer("map")[1] = 1.0
    else:
        model.module._buffers["map"] = torch.zeros(2**16 + 1)
    with fails_with("run.frozen_parameter_changed", "map"):
        watching.after_step(FIRST)
    model.module._buffers.pop("map")


def test_a_write_past_the_counters_shows_in_a_large_buffer(model: TrainableModel) -> None:
    model.module.register_buffer("map", torch.zeros(2**16 + 1), persistent=False)
    watching = guard(model)
    move(model, *model.names("lora"))
    model.module.get_buffer("map").numpy()[1] = 1.0
    watching.after_step(FIRST)
    with fails_with("run.frozen_parameter_changed", "map"):
        watching.after_round()
    model.module._buffers.pop("map")


def test_a_large_buffer_that_pytorch_does_not_count_is_summed(model: TrainableModel) -> None:
    with torch.inference_mode():
        model.module.register_buffer("map", torch.zeros(2**16 + 1), persistent=False)
    watching = guard(model, thorough=False)
    move(model, *model.names("lora"))
    with torch.inference_mode():
        model.module.get_buffer("map")[1] = 1.0
    with fails_with("run.frozen_parameter_changed", "map"):
        watching.after_step(FIRST)
    model.module._buffers.pop("map")


def test_under_noise_every_shared_parameter_moves(model: TrainableModel) -> None:
    first, *others = model.names("lora")
    watching = guard(model)
    move(model, *others)
    with fails_with("run.parameter_not_trained", str(first)):
        watching.after_step(FIRST)


def test_without_noise_a_parameter_may_wait_but_not_all(model: TrainableModel) -> None:
    watching = guard(model, noise=False)
    watching.after_step(FIRST)  # the A of LoRA has no gradient as long as B is zero
    with fails_with("run.nothing_trained"):
        watching.after_round()


@pytest.mark.parametrize("losses", [(None, None), (0.0, 1e-5)])
def test_a_round_with_nothing_to_teach_may_move_nothing(model: TrainableModel, losses: tuple[float | None, ...]) -> None:
    watching = guard(model, noise=False)
    for number, loss in enumerate(losses, start=1):
        watching.after_step(StepReport(number, len(losses), loss))
    watching.after_round()


@pytest.mark.parametrize("loss", [0.7, float("nan"), float("inf")])
def test_one_step_with_something_to_teach_has_to_move(model: TrainableModel, loss: float) -> None:
    """So an adapter that is not wired in is found, also where its batches are mostly empty, or its loss is no number."""
    watching = guard(model, noise=False)
    for number, seen in enumerate((None, loss, 0.0), start=1):
        watching.after_step(StepReport(number, 3, seen))
    with fails_with("run.nothing_trained"):
        watching.after_round()


def test_only_the_first_step_is_looked_at(model: TrainableModel) -> None:
    watching = guard(model)
    watching.after_step(SECOND)
