"""The cells of a comparison as tasks, played in this process or in several beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cotune.server.events import Listener
from cotune.simulations.cells import Cell
from cotune.simulations.room import Room
from cotune.simulations.workers import Task, play_beside, play_here
from cotune.strategies.plugins import source_of

__all__ = ["play_all", "task_of"]


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
