"""Rounds on a grid, simulated or of a real run, and what they must end with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cotune.flower.inprocess_grid import InProcessGrid
from cotune.models.trainable import State
from cotune.protocol.messages import Request
from cotune.server.app import train_rounds
from cotune.server.runs.run_folder import Progress, RunFolder
from cotune.server.time_limits import TimeLimits
from tests.support.organizations import Answer, adding, federation, model_of, update

NAMES = ("org-1", "org-2", "org-3")
IMPATIENT = TimeLimits(poll=0.01, watch=0.01, retry_backoff=0.02, approval_backoff=0.02, max_approval_backoff=0.05)


def simulate(
    folder: RunFolder,
    answers: Mapping[str, Answer],
    grid: type[InProcessGrid] = InProcessGrid,
    limits: TimeLimits = IMPATIENT,
) -> Progress:
    return play(folder, federation(folder.plan, answers, grid), limits)


def initial(folder: RunFolder) -> State:
    model = model_of(folder.plan)
    model.load({})
    return model.state(model.names("head"))


def assert_moved(state: State, start: State, by: float) -> None:
    assert state.keys() == start.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, start[name] + by)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def raises(request: Request) -> Any:
    raise MemoryError("out of memory")


def play(folder: RunFolder, grid: InProcessGrid, limits: TimeLimits = IMPATIENT) -> Progress:
    return train_rounds(grid, folder, model_of(folder.plan), lambda state: None, limits=limits)


def everybody(*values: float) -> dict[str, Answer]:
    return {name: adding(value) for name, value in zip(NAMES, values, strict=False)}


def dropped(progress: Progress) -> list[Mapping[str, str]]:
    return [{each["organization"]: each["reason"] for each in entry["dropped"]} for entry in progress.history]


def wrong_shape(request: Request) -> Any:
    return update(request, {"classifier.bias": torch.ones(3)})
