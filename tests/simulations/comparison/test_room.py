from __future__ import annotations

import pytest

from cotune.errors import DeviceError
from cotune.simulations.comparison.workers import WorkerSlots, available_memory


def test_the_first_cell_shows_how_many_fit() -> None:
    room = WorkerSlots(tasks=10, wanted=None, cores=8, memory=10_000)
    assert (room.most, room.jobs(), room.threads()) == (8, 1, 1)
    room.saw(1_000)
    assert room.jobs() == 8
    room.saw(3_000)  # another model, perhaps
    room.saw(1_000)
    assert room.jobs() == 3
    room.saw(20_000)
    assert room.jobs() == 1


def test_what_was_asked_for_is_done() -> None:
    room = WorkerSlots(tasks=10, wanted=3, cores=8, memory=10)
    assert (room.most, room.jobs(), room.threads()) == (3, 3, 2)
    room.saw(1_000)
    assert room.jobs() == 3


def test_never_more_than_there_is_to_do_and_one_on_a_gpu() -> None:
    assert WorkerSlots(tasks=2, wanted=None, cores=8, memory=10).most == 2
    assert WorkerSlots(tasks=0, wanted=5, cores=8, memory=10).most == 1
    gpu = WorkerSlots(tasks=10, wanted=None, cores=8, memory=10, on_gpu=True)
    assert (gpu.most, gpu.threads()) == (1, 8)
    assert WorkerSlots(tasks=10, wanted=2, cores=8, memory=10, on_gpu=True).most == 2


def test_this_machine() -> None:
    assert 1e6 < available_memory() < 1e15
    assert WorkerSlots.here(3, None, "cpu").cores >= 1
    with pytest.raises(DeviceError):
        WorkerSlots.here(3, None, "tpu")
