"""The physical batch that is found by itself: what it tries, in which order, and what it remembers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.device import is_out_of_memory
from cotune.models.local_events import observe_models
from cotune.models.physical_batch import PhysicalBatch, first_rows, open_batch
from cotune.models.trainable import TrainableModel
from tests.support.failures import fails_with

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small_heap")


def full() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def model(base_model: Callable[[str], Path]) -> TrainableModel:
    return TrainableModel(load_model(ModelConfig(base=str(base_model("bert"))), ("a", "b"), 1), None, 1, CPU)


@pytest.fixture
def told() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    with observe_models(lambda what, fields: events.append((what, fields))):
        yield events


@pytest.mark.parametrize(
    ("device", "expected", "rows"),
    [("cpu", 0.5, 2), ("cpu", 9.0, 8), ("cpu", 1e9, 32), ("cpu", float("inf"), 32), ("cuda", 600.0, 512), ("cuda", 64.0, 64)],
)
def test_the_first_size_follows_from_public_numbers(device: str, expected: float, rows: int) -> None:
    assert first_rows(torch.device(device), expected) == rows


def test_the_same_size_is_tried_twice_and_then_halved(model: TrainableModel, told: list[tuple[str, dict[str, Any]]]) -> None:
    batch = open_batch(model, "work", 32, least=2)
    tried = []

    def work() -> str:
        tried.append(batch.rows)
        if batch.rows > 8:
            raise full()
        return "done"

    assert batch.fit(work) == "done"
    assert tried == [32, 32, 16, 8]
    assert told == [
        ("physical_batch", {"rows": 16, "before": 32, "device": "cpu"}),
        ("physical_batch", {"rows": 8, "before": 16, "device": "cpu"}),
    ]


def test_what_did_not_fit_is_remembered_for_the_process(model: TrainableModel) -> None:
    batch = open_batch(model, "work", 32, least=2)
    with fails_with("device.record_does_not_fit"):
        batch.fit(_always_full)
    assert open_batch(model, "work", 32, least=2).rows == 2
    assert open_batch(model, "other work", 32, least=2).rows == 32


def test_what_has_fitted_is_not_tried_again(model: TrainableModel) -> None:
    runs = []
    for rows in (16, 16, 8, 32):
        open_batch(model, "work", rows, least=2).fit_first(lambda rows=rows: runs.append(rows))
    assert runs == [16, 32]


def test_the_smallest_batch_that_does_not_fit_is_one_sentence(model: TrainableModel) -> None:
    with fails_with("device.record_does_not_fit", "(1)"):
        open_batch(model, "work", 3, least=1).fit(_always_full)


def test_a_fixed_size_fails_as_it_is() -> None:
    runs = []

    def work() -> None:
        runs.append(1)
        raise full()

    with pytest.raises(torch.OutOfMemoryError):
        PhysicalBatch(32, CPU).fit(work)
    assert len(runs) == 1


def test_other_failures_are_not_repeated(model: TrainableModel) -> None:
    runs = []

    def work() -> None:
        runs.append(1)
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        open_batch(model, "work", 32, least=2).fit(work)
    assert len(runs) == 1


def test_nothing_of_a_failed_try_is_held_in_the_next(model: TrainableModel) -> None:
    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    seen = []

    def work() -> None:
        gc.collect()
        seen.append(Held.alive)
        held = Held()
        if len(seen) < 3:
            raise full()
        del held

    open_batch(model, "work", 32, least=2).fit(work)
    assert seen == [0, 0, 0]


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def _always_full() -> None:
    raise full()
