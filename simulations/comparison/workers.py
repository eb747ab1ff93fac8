"""Processes that play one cell of a comparison at a time, several beside each other.

A worker is a fresh process (spawn) that receives its work through a pipe, and ends when the process that started it does,
however that ends. What it runs is durable round by round, so it may be killed at any moment.

The cells of a comparison as tasks, played in this process or in several beside each other.

How many cells of a comparison fit on this machine at a time.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cotune.errors import CotuneError, RunError
from cotune.models.device import pick_device
from cotune.observers import Observer
from cotune.plan.load import parse_plan
from cotune.reporting.documents.summary import RunSummary, read_summary
from cotune.server.runs.events import observe_run
from cotune.simulations.comparison.grid import GridPoint
from cotune.strategies.plugins import get_source, register_file
from cotune.worker_process import WorkerProcess, receive_all


@dataclass(frozen=True)
class Task:
    """A run of a grid to train.

    Attributes:
        name: Of the grid point.
        plan: Resolved, as canonical JSON.
        rounds: Of the plan.
        folder: Of the run.
        device: auto, cpu, cuda or cuda:N.
        files: Of the plan's own rules, with their paths.
    """

    name: str
    plan: str
    rounds: int
    folder: Path
    device: str
    files: tuple[str, ...] = ()

    @property
    def started(self) -> dict[str, Any]:
        return {"cell": self.name, "rounds": self.rounds}


def run_here(task: Task, listener: Observer) -> str:
    """Plays a cell in this process, from its last finished round; returns why it failed, or "" when it did not."""
    from cotune.simulations.run import resume, simulate  # not above: a worker watches its parent before it imports torch

    def forward(event: str, fields: dict[str, Any]) -> None:
        if event == "round_finished":
            listener("cell_round", {"cell": task.name, **fields})

    with observe_run(forward):
        try:
            if (task.folder / "run.json").exists():
                resume(task.folder)
            else:
                shutil.rmtree(task.folder, ignore_errors=True)  # killed before it was the folder of a run
                for name in task.files:
                    register_file(name, Path())
                simulate(parse_plan(json.loads(task.plan)), task.folder, device=task.device)
        except CotuneError as error:
            return str(error)
        except Exception as error:  # one cell must not cost the others
            return f"{type(error).__name__}: {error}"
    return ""


def import_all(names: Sequence[str]) -> None:
    """Imports modules by name, or by path where it ends in .py: they may register architectures with transformers.

    Raises ImportError for a file whose name another module has already.
    """
    for name in names:
        if name.endswith(".py"):
            _import_file(Path(name).resolve())
        else:
            importlib.import_module(name)


def _import_file(path: Path) -> None:
    present = sys.modules.get(path.stem)
    if present is not None and Path(str(present.__file__)).resolve() == path:
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if present is not None or spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported as {path.stem}: expected a file with a name that no other module has")
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@dataclass(eq=False)
class _Worker:
    process: WorkerProcess
    task: Task | None = None


def run_in_parallel(
    tasks: Sequence[Task], imports: Sequence[str], jobs: Callable[[], int], threads: Callable[[], int], listener: Observer
) -> Iterator[tuple[Task, str]]:
    """Plays cells in up to `jobs()` processes, asked again after each; yields each cell with why it failed ("": it did not).

    When the caller stops iterating, for whatever reason, all processes are killed.
    """
    waiting = list(reversed(tasks))
    workers = list[_Worker]()
    try:
        while waiting or any(worker.task for worker in workers):
            while waiting and sum(worker.task is not None for worker in workers) < jobs():
                worker = _idle(workers, imports)
                worker.task = waiting.pop()
                listener("cell_started", worker.task.started)
                worker.process.pipe.send((worker.task, threads()))
            for worker in _ready_workers(workers):
                yield from _receive(worker, workers, listener)
    finally:
        for worker in workers:
            worker.process.kill()


def _idle(workers: list[_Worker], imports: Sequence[str]) -> _Worker:
    """A worker without a task: one that is there, else a new one."""
    for worker in workers:
        if worker.task is None and worker.process.is_alive():
            return worker
    workers.append(_Worker(WorkerProcess(_work, tuple(imports))))
    return workers[-1]


def _ready_workers(workers: Sequence[_Worker]) -> list[_Worker]:
    ready = wait([worker.process.pipe for worker in workers if worker.task])
    return [worker for worker in workers if worker.process.pipe in ready]


def _receive(worker: _Worker, workers: list[_Worker], listener: Observer) -> Iterator[tuple[Task, str]]:
    """One message of a worker: what happens in its cell, or that the cell has ended. A worker that died says nothing more."""
    assert worker.task is not None
    try:
        kind, payload = worker.process.pipe.recv()
    except (EOFError, ConnectionResetError):
        workers.remove(worker)
        yield worker.task, f"its process ended with {worker.process.wait()}: perhaps memory ran out; try fewer --jobs"
        return
    if kind == "ended":
        task = worker.task
        worker.task = None
        yield task, payload
    else:
        listener(kind, payload)


def _work(pipe: Connection, imports: tuple[str, ...]) -> None:
    """What a worker does until its parent ends."""
    import_all(imports)
    import torch

    for task, threads in receive_all(pipe):
        torch.set_num_threads(threads)
        pipe.send(("ended", run_here(task, lambda event, fields: pipe.send((event, fields)))))


class WorkerSlots:
    """How many processes run beside each other: as many as were asked for, else as cores and memory allow.

    What a run needs is known from those that have finished.

    Args:
        tasks: How many runs there are.
        wanted: How many processes were asked for; None: as many as fit.
        cores: Of the machine.
        memory: Bytes that all processes may have together.
        on_gpu: Whether they share one GPU.
    """

    def __init__(self, tasks: int, wanted: int | None, cores: int, memory: int, *, on_gpu: bool = False) -> None:
        self.wanted = wanted
        self.cores = cores
        self.memory = memory
        self.needed = 0
        self.most = max(1, min(tasks, wanted or (1 if on_gpu else cores)))

    @classmethod
    def here(cls, tasks: int, wanted: int | None, device: str) -> WorkerSlots:
        """On this machine as it is now. Raises DeviceError for a device that is not there."""
        return cls(tasks, wanted, _cores(), available_memory(), on_gpu=pick_device(device).type == "cuda")

    def saw(self, needed: int) -> None:
        """The bytes that a cell has needed."""
        self.needed = max(self.needed, needed)

    def jobs(self) -> int:
        """How many may run now: one, until it is known what one needs."""
        if self.wanted is not None:
            return self.most
        return max(1, min(self.most, self.memory // self.needed)) if self.needed else 1

    def threads(self) -> int:
        """For each, so that all together keep the cores busy."""
        return max(1, self.cores // self.most)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that new processes can have without swapping; all of the machine's where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def build_task(cell: GridPoint, name: str, place: Path, device: str) -> Task:
    """Return what a worker needs to play a cell in a folder under a name."""
    files = tuple(get_source(rule, sha256) for rule, sha256 in cell.plan.strategy.files.items())
    return Task(name, cell.plan.canonical(), cell.plan.rounds, place, device, files)


def run_all(tasks: Sequence[Task], room: WorkerSlots, imports: Sequence[str], listener: Observer) -> Iterator[tuple[Task, str]]:
    """Play tasks one after the other here, or beside each other where there is room; yield each with why it failed."""
    if room.most > 1:
        yield from run_in_parallel(tasks, imports, room.jobs, room.threads, listener)
        return
    for task in tasks:
        listener("cell_started", task.started)
        yield task, run_here(task, listener)


def make_folder(folder: Path) -> None:
    """Make the folder of a comparison where there is none. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the folder {folder} cannot be written ({error.strerror}): choose another with --out", code="run.not_writable"
        ) from None


def read_run_summary(run: Path) -> RunSummary:
    """Return the summary of a finished run."""
    return read_summary(run / "summary.json")
