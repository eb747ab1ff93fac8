"""The baselines of a run, trained by its workers beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from cotune.errors import RunError
from cotune.reporting.documents.events import BaselineFailed, BaselineStarted
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.workers.pool import Task, WorkerPool


def train_beside(folder: RunFolder, baselines: Sequence[RunFolder], pool: WorkerPool) -> Iterator[RunFolder]:
    """Train baselines, which are begun in the order given, and yield those that are trained, in this order.

    Args:
        folder: Of the run, for the events.
        baselines: Their folders.
        pool: The workers.

    Raises:
        RunError: Workers died of a baseline (`run.worker_died`), or it has failed in a way that would end the run in one process,
            too (`run.baseline_failed`).
    """
    tasks = {baseline.path: _put(folder, baseline, pool) for baseline in baselines if not baseline.finished}
    for baseline in baselines:
        reason = _take(tasks[baseline.path], pool, len(tasks)) if baseline.path in tasks else ""
        if reason:  # a comparison that cannot be made must not cost the run itself
            folder.events.write(BaselineFailed(baseline=baseline.file.run, reason=reason))
        else:
            yield baseline


def _put(folder: RunFolder, baseline: RunFolder, pool: WorkerPool) -> Task:
    name = baseline.file.run

    def send(pipe: Connection) -> None:
        folder.events.write(BaselineStarted(baseline=name))
        pipe.send(str(baseline.path))

    task = Task(f"baseline {name}", name, send, _receive)
    pool.put(task)
    return task


def _receive(pipe: Connection) -> Any:
    return pipe.recv()


def _take(task: Task, pool: WorkerPool, ahead: int) -> str:
    """Wait until a baseline is trained, and return why it could not be; "" where it was."""
    trained = pool.take(task, ahead)
    if trained.ends_run:
        raise RunError(
            f"the {task.name} cannot be trained ({trained.reason}): expected no such error; correct what it names, and continue"
            " with --resume",
            code="run.baseline_failed",
        )
    reason: str = trained.reason
    return reason
