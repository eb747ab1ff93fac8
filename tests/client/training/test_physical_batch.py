"""`physical_batch_size = "auto"`: the same model and the same charge, wherever memory runs out."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.random import default_rng
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cotune.client.site import Site
from cotune.client.training import charged_steps as training
from cotune.client.training.round import train_round
from cotune.models.local_events import observe_models
from cotune.models.trainable import State, get_model
from cotune.plan.load import dump_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDSetup, StepReport
from cotune.storage.json_documents import parse_toml
from cotune.strategies.types import Delta
from tests.support.failures import fails_with
from tests.support.processes import forked

__all__ = ["forked"]  # fixtures

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]
Finished = tuple[Delta, list[Steps]]
pytestmark = pytest.mark.usefixtures("small_heap")  # every failure collects garbage
PRIVATE = {"epsilon": 4.0, "delta": 1e-3}
LOCAL = {"batch_size": 0.5, "steps": 2, "learning_rate": 0.25}
MODES = {
    "lora": {"train": "lora"},
    "full": {"train": "full"},
    "second stage": {"train": [{"mode": "lora", "rounds": 1}, {"mode": "full", "rounds": 1}], "round": 2},
    "own head": {"train": "lora", "personal": ["head"]},
    "ditto": {"train": "lora", "personal": "ditto"},
    "adam": {"train": "lora", "local": {"optimizer": "adam", "learning_rate": 0.01}},
}


class Memory:
    """Passes of the encoder, which run out of memory when they are told to."""

    def __init__(self, most_rows: float = float("inf"), failing: Sequence[int] = (), killed: int = 0) -> None:
        self.most_rows = most_rows
        self.failing = set(failing)
        self.killed = killed
        self.counted = False
        self.passes = 0
        self.shapes: list[int] = []
        self.failures = 0

    def __call__(self, _: nn.Module, __: Any, ___: dict[str, Any], given: Any) -> None:
        rows = len(given[0])
        self.shapes.append(rows)
        if self.counted:
            self.passes += 1
            if self.passes == self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
        if rows > self.most_rows or (self.counted and self.passes in self.failing):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples and the same noise in every run, which no plan can ask for."""

    class Seeded(DPSGD):
        def run(self, setup: DPSGDSetup) -> Iterator[StepReport]:
            return super().run(replace(setup, noise_generator=default_rng(1), sampling_generator=default_rng(2)))

    monkeypatch.setattr(training, "DPSGD", Seeded)


def play(plan: Plan, site: Site, round: int, state: State, memory: Memory) -> Delta:
    """Train a round on a model that this process knows nothing of; passes of `memory` are counted from the first step on."""
    get_model.cache_clear()
    encoder = get_plan_model(plan, "cpu").loaded.module.base_model
    begin = training._train_shared

    def counted(*given: Any) -> int:
        memory.counted = True
        try:
            return begin(*given)
        finally:
            memory.counted = False

    with pytest.MonkeyPatch.context() as patch, encoder.register_forward_hook(memory, with_kwargs=True):
        patch.setattr(training, "_train_shared", counted)
        return train_round(plan, site, round, state).delta


@pytest.fixture
def plan_of(make_plan: MakePlan) -> MakePlan:
    """(physical_batch_size, tables of the plan) -> the plan."""

    def make(size: int | str, **tables: Any) -> Plan:
        local = {**LOCAL, **tables.pop("local", {}), "physical_batch_size": size}
        return make_plan(local=local, **tables)

    return make


@pytest.fixture
def run(plan_of: MakePlan, make_site: MakeSite, state_for: StateFor, seeded: None) -> Any:
    """(name, memory, tables of the plan) -> the delta of a round, and what the site's ledger says is spent."""

    def play_at(name: str, memory: Memory, size: int | str = "auto", round: int = 1, **tables: Any) -> Finished:
        plan = plan_of(size, **tables)
        site = make_site(at=name)
        return play(plan, site, round, state_for(plan, round), memory), site.ledger().spent()

    return play_at


@pytest.fixture(scope="module")
def references() -> dict[str, Finished]:
    """Finished rounds in which memory never ran out, by what they train."""
    return {}


@pytest.fixture
def undisturbed(run: Any, references: dict[str, Finished]) -> Any:
    """(physical_batch_size, tables of the plan) -> what `run` gives with enough memory, played once for all tests."""

    def look_up(size: int | str, **tables: Any) -> Finished:
        key = repr((size, tables))
        if key not in references:
            references[key] = run("undisturbed", Memory(), size, **tables)
        return references[key]

    return look_up


def assert_close(got: Delta, expected: Delta) -> None:
    assert got.keys() == expected.keys()
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e-4, "something has moved"
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-3)


def long(*values: Any) -> Any:
    """A case whose claim the others also test, in parts."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("mode", "privacy"),
    [
        ("lora", PRIVATE),
        ("ditto", "none"),
        *(long(mode, PRIVATE) for mode in MODES if mode != "lora"),
        long("lora", "none"),
    ],
)
def test_a_size_that_shrinks_gives_the_same_model(run: Any, undisturbed: Any, mode: str, privacy: Any) -> None:
    tables = {**MODES[mode], "privacy": privacy}
    expected, paid = undisturbed(8, **tables)
    memory = Memory(most_rows=4)
    found, spent = run("auto", memory, **tables)
    assert memory.failures
    assert_close(found, expected)
    assert spent == paid


@pytest.mark.parametrize(
    ("failing", "privacy"),
    [
        ((2, 3), PRIVATE),
        ((5, 6), "none"),
        *(long(failing, PRIVATE) for failing in ((1, 2), (4,), (5, 6))),
        *(long(failing, "none") for failing in ((1, 2), (2, 3), (4,))),
    ],
)
def test_a_step_that_fails_half_way_counts_nothing_twice(
    run: Any, undisturbed: Any, failing: tuple[int, ...], privacy: Any
) -> None:
    """In the first pass of a round, in the middle of a sum, once and twice in a row, and in a later step."""
    expected, paid = undisturbed(8, train="full", privacy=privacy)
    memory = Memory(failing=failing)
    found, spent = run("auto", memory, train="full", privacy=privacy)
    assert memory.failures == len(failing)
    assert_close(found, expected)
    assert spent == paid


@pytest.mark.parametrize("privacy", ["none", PRIVATE])
def test_one_failure_repeats_the_same_batches_to_the_bit(run: Any, privacy: Any) -> None:
    """No record's memory may change the shapes that others are computed in: freed memory is tried first."""
    expected, _ = run("untroubled", Memory(), train="full", privacy=privacy)
    found, _ = run("troubled", Memory(failing=(2,)), train="full", privacy=privacy)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def play_alone(document: str, site: Path, state: Path, memory: Memory) -> None:
    """In a process of its own."""
    play(parse_plan(parse_toml(document)), Site(site), 1, load_file(state), memory)


@pytest.mark.crash
def test_a_killed_round_is_trained_again_to_the_same_bits(
    run: Any,
    plan_of: MakePlan,
    make_site: MakeSite,
    state_for: StateFor,
    forked: Callable[..., BaseProcess],
    tmp_path: Path,
) -> None:
    """The process that comes after knows nothing of what did not fit, and finds the same size before it trains."""
    plan = plan_of("auto", train="full")
    site = make_site(at="killed")
    state = tmp_path / "state.safetensors"
    save_file(state_for(plan), state)
    process = forked(play_alone, dump_plan(plan), site.folder, state, Memory(most_rows=4, killed=5))
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    expected, _ = run("whole", Memory(most_rows=4), train="full")
    found, _ = run("killed", Memory(most_rows=4), train="full")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_size_is_found_before_anything_is_charged(run: Any, make_site: MakeSite) -> None:
    with fails_with("device.record_does_not_fit"):
        run("full", Memory(most_rows=0), train="lora", privacy=PRIVATE)
    assert make_site(at="full").ledger().spent() == []


def test_records_do_not_decide_the_size(run: Any) -> None:
    """It is found on made-up records of the greatest length, so that steps on records need not shrink it."""
    memory = Memory(most_rows=4)
    run("auto", memory, train="lora", privacy=PRIVATE)
    first = next(i for i, rows in enumerate(memory.shapes) if rows <= 4)
    assert all(rows <= 4 for rows in memory.shapes[first:])


def test_a_smaller_size_is_told(run: Any) -> None:
    told: list[dict[str, Any]] = []
    with observe_models(lambda what, fields: told.append(fields) if what == "physical_batch" else None):
        run("auto", Memory(most_rows=8), train="lora", privacy=PRIVATE)
    assert [(each["before"], each["rows"]) for each in told] == [(16, 8)]


def test_a_shape_that_was_not_checked_is_checked_first(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = training.check_gradients

    def watched(setup: Any, *rest: Any) -> float:
        checked.append(setup.physical.rows)
        return check(setup, *rest)

    monkeypatch.setattr(training, "check_gradients", watched)
    run("auto", Memory(failing=(1, 2)), train="lora", privacy=PRIVATE)
    assert checked == [8]


def test_dropout_and_full_memory_fail_closed(run: Any) -> None:
    with fails_with("device.out_of_memory_with_dropout"):
        run("auto", Memory(failing=(1, 2)), train="full", privacy=PRIVATE, local={"dropout": 0.1})


def test_a_fixed_size_that_does_not_fit_is_one_sentence(run: Any) -> None:
    with fails_with("device.out_of_memory"):
        run("fixed", Memory(most_rows=4), 8, train="lora", privacy=PRIVATE)


def test_a_failure_inside_the_backward_pass_leaves_nothing(run: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of Opacus keep inputs and sizes of a pass on the layers; a smaller batch after it must not read them."""
    expected, _ = undisturbed(8, train="full", privacy=PRIVATE)
    backward = Tensor.backward
    calls: list[int] = []
    memory = Memory()

    def failing(loss: Tensor, *given: Any, **more: Any) -> None:
        calls.append(memory.counted)
        if memory.counted and sum(calls) in (2, 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        backward(loss, *given, **more)

    monkeypatch.setattr(Tensor, "backward", failing)
    found, _ = run("auto", memory, train="full", privacy=PRIVATE)
    assert sum(calls) > 3
    assert_close(found, expected)
