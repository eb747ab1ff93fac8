"""The step of a round, rounded: nothing is lost for good, and the last round makes up for what is left."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotune.plan.plan import Plan
from cotune.plan.wire import Codec
from cotune.protocol.changes import add_change
from cotune.protocol.codecs import pack
from cotune.server.rounds.rounded_step import round_step
from tests.support.run_folders import NewRun

NARROW = tuple(codec for codec in get_args(Codec) if codec != "float32")

STEP = {"bfloat16": 2**-7, "int8": 2 / 127, "int4": 2 / 7}  # the largest error of a value, by the largest value of its block


@pytest.fixture
def plan(new_run: NewRun) -> Plan:
    return new_run(rounds=6).plan


def with_codec(plan: Plan, codec: Codec) -> Plan:
    return plan.model_copy(update={"wire_down": codec})


def drawn(seed: int, scale: float, count: int = 130) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.0, scale, count).astype(np.float32))


def test_without_a_codec_the_step_is_as_it_was(plan: Plan) -> None:
    moved = {"w": drawn(1, 1.0)}
    step = round_step(plan, 1, {"w": torch.zeros(130)}, ["w"], moved, {"optimizer/w": torch.ones(1)}, {})
    assert step.state is moved
    assert step.change == {}
    assert step.memory.keys() == {"optimizer/w"}


def max_abs(values: Tensor) -> float:
    return float(values.abs().max())


@pytest.mark.parametrize("codec", NARROW)
def test_state_and_loss_add_up_to_all_moves(plan: Plan, codec: Codec) -> None:
    """Over rounds whose moves differ by orders of magnitude: what is lost stays below a step of the newest grid, and of the last
    round nothing is.
    """
    plan = with_codec(plan, codec)
    state = {"w": drawn(0, 1.0)}
    total = state["w"].double()
    memory: dict[str, Tensor] = {}
    worst_lost = 0.0
    for number in range(1, plan.rounds + 1):
        move = drawn(number, 10.0 ** (1 - number))
        moved = {"w": state["w"] + move}
        total = total + (moved["w"].double() - state["w"].double())
        step = round_step(plan, number, state, ["w"], moved, {}, memory)
        if number < plan.rounds:
            pack(codec, step.change["w"])  # raises where it is not rounded
            assert torch.equal(add_change(state, step.change)["w"], step.state["w"])
            lost = step.memory["wire_down/w"].double()
            torch.testing.assert_close(step.state["w"].double() + lost, total, atol=1e-5, rtol=0)
            worst = max_abs(move) + worst_lost
            worst_lost = max_abs(lost)
            assert worst_lost <= STEP[codec] * worst * (1 + 1e-6)
        state, memory = step.state, step.memory
    assert (step.change, memory) == ({}, {})
    torch.testing.assert_close(state["w"].double(), total, atol=1e-5, rtol=0)


@pytest.mark.parametrize("codec", NARROW)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_round_that_is_repeated_is_rounded_alike(plan: Plan, codec: Codec, data: st.DataObject) -> None:
    values = drawn(data.draw(st.integers(0, 2**16)), 1.0)
    number = data.draw(st.integers(1, 5))
    steps = [round_step(with_codec(plan, codec), number, {"w": torch.zeros(130)}, ["w"], {"w": values}, {}, {}) for _ in range(2)]
    assert torch.equal(steps[0].state["w"], steps[1].state["w"])


def test_rounds_and_parameters_are_rounded_by_other_numbers(plan: Plan) -> None:
    half = with_codec(plan, "int4")
    zeros = {"w": torch.zeros(640), "v": torch.zeros(640)}
    moved = {name: drawn(3, 1.0, 640) for name in zeros}
    first, second = (round_step(half, number, zeros, ["w", "v"], moved, {}, {}) for number in (1, 2))
    assert not torch.equal(first.change["w"], first.change["v"])
    assert not torch.equal(first.change["w"], second.change["w"])


def test_what_is_not_shared_and_has_not_moved_is_no_part_of_the_change(plan: Plan) -> None:
    """And what was lost of it before waits for the round in which it moves again, or for the last one."""
    plan = with_codec(plan, "int4")
    state = {"w": torch.zeros(4), "still": torch.ones(4)}
    before = {"wire_down/still": torch.full((4,), 0.25)}
    moved = {"w": torch.ones(4), "still": state["still"].clone()}
    step = round_step(plan, 2, state, ["w"], moved, {}, before)
    assert step.change.keys() == {"w"}
    assert torch.equal(step.state["still"], torch.ones(4))
    assert torch.equal(step.memory["wire_down/still"], torch.full((4,), 0.25))
    last = round_step(plan, plan.rounds, state, ["w"], moved, {}, before)
    assert torch.equal(last.state["still"], torch.full((4,), 1.25))


def test_what_is_moved_and_not_shared_is_part_of_the_change(plan: Plan) -> None:
    """As weights that a fusion changes beside the adapters of them."""
    step = round_step(with_codec(plan, "int4"), 2, {"w": torch.zeros(4)}, [], {"w": torch.ones(4)}, {}, {})
    assert torch.equal(step.state["w"], torch.ones(4))
    assert step.change.keys() == {"w"}


def test_what_was_lost_of_a_shared_parameter_is_made_up_for_without_a_move(plan: Plan) -> None:
    state = {"w": torch.zeros(4)}
    step = round_step(with_codec(plan, "int8"), 2, state, ["w"], dict(state), {}, {"wire_down/w": torch.full((4,), 0.25)})
    assert torch.equal(step.state["w"], torch.full((4,), 0.25))
    assert torch.equal(step.memory["wire_down/w"], torch.zeros(4))
