"""The cells of a comparison as tasks, played in this process or in several beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cotune.models.errors import RunError
from cotune.server.events import Listener
from cotune.simulations.cells import Cell
from cotune.simulations.room import Room
from cotune.simulations.workers import Task, play_beside, play_here
from cotune.strategies.plugins import source_of


def task_of(cell: Cell, name: str, place: Path, device: str) -> Task:
    """Return what a worker needs to play a cell in a folder under a name."""
    files = tuple(source_of(rule, sha256) for rule, sha256 in cell.plan.strategy.files.items())
    return Task(name, cell.plan.canonical(), cell.plan.rounds, place, device, files)


def play_all(tasks: Sequence[Task], room: Room, imports: Sequence[str], listener: Listener) -> Iterator[tuple[Task, str]]:
    """Play tasks one after the other here, or beside each other where there is room; yield each with why it failed."""
    if room.most > 1:
        yield from play_beside(tasks, imports, room.jobs, room.threads, listener)
        return
    for task in tasks:
        listener("cell_started", task.started)
        yield task, play_here(task, listener)


def make_folder(folder: Path) -> None:
    """Make the folder of a comparison where there is none. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder {folder} cannot be written ({error.strerror}): choose another with --out") from None


def summary_of(run: Path) -> dict[str, Any]:
    """Return the summary of a finished run."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_bytes())
    return found
