"""A grid whose messages are answered by the workers of a run, and their start."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection

import torch
from flwr.app import Message

from cotune.client import local_events as client_events
from cotune.errors import PlanError
from cotune.flower.local_grid import LocalGrid
from cotune.flower.message_pipe import receive_message, send_message
from cotune.models import local_events as model_events
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.workers.pool import Task, WorkerPool
from cotune.simulations.workers.start import CLIENT, MODELS, work


def check_workers(workers: int, engine: str) -> None:
    """Raises PlanError for a number of workers that cannot be, or that the engine does not take."""
    if workers < 1:
        raise PlanError(f"--workers {workers} is no number of processes: expected 1 or more", code="plan.invalid_workers")
    if workers > 1 and engine != "in-process":
        raise PlanError(
            f"--workers {workers} and the engine {engine} exclude each other: Ray starts processes of its own; leave one out",
            code="plan.workers_on_ray",
        )


@contextmanager
def share_threads(workers: int) -> Iterator[None]:
    """Let this process compute with as many threads during the block as each worker has that is opened in it.

    The same number everywhere: the order of a sum may depend on it, and with that the last bit of a model.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def open_workers(folder: RunFolder, workers: int) -> Iterator[WorkerPool | None]:
    """Give the workers of a run, which end with the block; None for one: that is this process."""
    if workers == 1:
        yield None
        return
    gpus = _spread_gpus(folder.file.device, workers)
    arguments = [(folder.path, torch.get_num_threads(), gpu) for gpu in gpus]
    observers = {
        CLIENT: lambda event, fields: client_events.notify(event, **fields),
        MODELS: lambda event, fields: model_events.notify(event, **fields),
    }
    with closing(WorkerPool(work, arguments, observers)) as pool:
        yield pool


def _spread_gpus(device: str, workers: int) -> list[str | None]:
    """Return the GPU of each worker, in turn; None where one is named, or there are not several."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    if count < 2:
        return [None] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return [names[worker % count].strip() for worker in range(workers)]


class WorkerGrid(LocalGrid):
    """A grid of simulated nodes, for which workers answer.

    Replies are pulled in the server's order, in which it adds them up. Meanwhile workers go on with later messages of the round;
    about one reply for each of them waits.

    Args:
        pool: The workers.
        folder: Of the run.
    """

    def __init__(self, pool: WorkerPool, folder: RunFolder) -> None:
        participants = folder.file.participants
        super().__init__(len(participants))
        self._pool = pool
        self._names = {node: who.name for node, who in zip(self.nodes, participants, strict=True)}
        server = folder.plan.server
        # spare organizations may turn out not to be needed: until they are, they must not be charged
        self._sure = server.sample_size if server.over_selection else len(participants)  # messages of a round
        self._round = ""
        self._pushed = 0  # messages of this round
        self._tasks: dict[str, Task] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages until they are answered, and return their ids."""
        numbers = list(super().push_messages(messages))
        for number in numbers:
            self._tasks[number] = self._put(self._pending.pop(number))
        return numbers

    def _put(self, message: Message) -> Task:
        metadata = message.metadata
        if metadata.group_id != self._round:
            self._round = metadata.group_id
            self._pushed = 0
        self._pushed += 1

        def send(pipe: Connection) -> None:
            pipe.send("")
            send_message(pipe, message)

        node = metadata.dst_node_id
        name = f"round {self._round} of {self._names[node]}"
        task = Task(name, node, send, receive_message, is_early=self._pushed <= self._sure)
        self._pool.put(task)
        return task

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Wait for the reply to each message, and yield them. Raises RunError where workers died of one."""
        for number in message_ids:
            task = self._tasks.pop(number, None)
            if task is not None:
                yield self._pool.take(task, 2 * self._pool.size)

    def discard(self, message_ids: Iterable[str]) -> None:
        """Let go of messages whose replies nobody will pull."""
        for number in message_ids:
            task = self._tasks.pop(number, None)
            if task is not None:
                self._pool.drop(task)
