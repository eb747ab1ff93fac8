"""Tasks for a few worker processes, whose results are taken one after the other, in an order of the caller's.

While one result is awaited, workers go on with other tasks. Tasks of one owner never run beside each other, and go to the worker
that has done the last of them, unless it is busy and another one is idle: what a worker keeps in memory saves time, and no result
depends on it.

A worker may die at any moment. Its task is done again by another one, so that a task must be one that can be begun twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cotune.errors import RunError
from cotune.observers import Observer
from cotune.worker_process import WorkerProcess

EVENT = "event"  # a worker sends (EVENT, who observes it, the event, its fields)
DONE = "done"  # or (DONE, memory, memory of a GPU), and then what the task receives
_MOST_DEATHS = 2  # of workers, with one task


@dataclass(frozen=True)
class Peak:
    """The most memory that a process has held, or several together.

    Attributes:
        memory: Resident set, in bytes.
        gpu: Tensors on one GPU, in bytes; 0: none.
    """

    memory: int = 0
    gpu: int = 0

    def __add__(self, other: Peak) -> Peak:
        return Peak(self.memory + other.memory, self.gpu + other.gpu)


@dataclass(eq=False)
class Task:
    """Something that a worker does.

    Attributes:
        name: What it is, for the error where workers die of it.
        owner: Whose tasks do not run beside each other.
        send: Writes it to a worker's pipe.
        receive: Reads its result, which is not None, from that pipe.
        is_early: Whether it may be begun before its result is asked for.
    """

    name: str
    owner: object
    send: Callable[[Connection], None]
    receive: Callable[[Connection], Any]
    is_early: bool = True
    _result: Any = None
    _failure: RunError | None = None
    _deaths: int = 0

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or none will come."""
        return self._result is not None or self._failure is not None

    def finish(self, result: Any) -> None:
        """Keep the result."""
        self._result = result

    def note_death(self, exit_code: int | None) -> None:
        """Note that a worker has died of it; of a task that several die of, no result will come."""
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            self._failure = RunError(
                f"{self._deaths} worker processes ended in {self.name}, the last one with {exit_code}: expected them to go on;"
                " perhaps memory ran out, so continue with --resume and fewer --workers",
                code="run.worker_died",
            )

    def result(self) -> Any:
        """Return the result. Raises RunError where none will come (`run.worker_died`)."""
        if self._failure is not None:
            raise self._failure
        return self._result


@dataclass(eq=False)
class _Worker:
    """A process, what it is at, and whether it may have died before that: it was idle, and has said nothing since."""

    process: WorkerProcess
    task: Task | None = None
    peak: Peak = Peak()
    may_be_dead: bool = False


class WorkerPool:
    """Processes that are started when there is something to do for them.

    Args:
        work: A module's function, called in every process with its end of the pipe and the arguments. It answers every task with
            `DONE` and what the task receives; before that, it may send any number of `EVENT`.
        arguments: Of each process.
        observers: Who -> what is called in this process with events and their fields.
    """

    def __init__(
        self, work: Callable[..., None], arguments: Sequence[tuple[Any, ...]], observers: Mapping[str, Observer]
    ) -> None:
        self._work = work
        self._arguments = arguments
        self._observers = observers
        self._workers: list[_Worker | None] = [None] * len(arguments)
        self._tasks: dict[Task, None] = {}  # that were not taken yet, in order
        self._begun: set[Task] = set()  # of these
        self._last: dict[object, _Worker] = {}  # owner -> who has its last task

    @property
    def size(self) -> int:
        """The most processes that work at a time."""
        return len(self._arguments)

    @property
    def peak(self) -> Peak:
        """The sum of the most memory that each worker has held: they need not have done so at the same time."""
        return sum((worker.peak for worker in self._workers if worker), Peak())

    def put(self, task: Task) -> None:
        """Add a task behind all others. None is begun outside of `take`."""
        self._tasks[task] = None

    def take(self, task: Task, ahead: int) -> Any:
        """Wait for the result of a task, and return it.

        Args:
            task: It was put, and not taken yet.
            ahead: How many tasks may be under way, or done and not taken, beside it.

        Raises:
            RunError: If workers died of the task.
        """
        while not task.is_done:
            self._hand_out(task, ahead)
            self._listen()
        self.drop(task)
        return task.result()

    def drop(self, task: Task) -> None:
        """Forget a task that nobody will take. If a worker is at it, it is done all the same."""
        self._tasks.pop(task, None)
        self._begun.discard(task)

    def close(self) -> None:
        """End all processes at once."""
        for worker in self._workers:
            if worker is not None:
                worker.process.kill()
        self._workers = [None] * self.size

    # --- who does what

    def _hand_out(self, wanted: Task, ahead: int) -> None:
        """Give tasks to workers that have none."""
        while found := self._match(list(self._find_startable(wanted, ahead))):
            place, task = found
            worker = self._workers[place] or _Worker(WorkerProcess(self._work, *self._arguments[place]))
            self._workers[place] = worker
            worker.task = task
            self._begun.add(task)
            self._last[task.owner] = worker
            try:
                task.send(worker.process.pipe)
            except OSError:  # it died before
                self._bury(worker)

    def _match(self, tasks: Sequence[Task]) -> tuple[int, Task] | None:
        """Return the place of a worker without a task, and a task for it: of an owner whose last task it had, else the first."""
        idle = [place for place, worker in enumerate(self._workers) if worker is None or worker.task is None]
        idle.sort(key=lambda place: self._workers[place] is None)  # those that are there first
        if not idle or not tasks:
            return None
        for place in idle:
            worker = self._workers[place]
            for task in tasks if worker else ():
                if self._last.get(task.owner) is worker:
                    return place, task
        return idle[0], tasks[0]

    def _find_startable(self, wanted: Task, ahead: int) -> Iterator[Task]:
        """Yield what can be begun now, in order: what is wanted, and as many others as may be under way."""
        waiting = {worker.task.owner for worker in self._workers if worker and worker.task}
        room = ahead - len(self._begun)
        if not (wanted in self._begun or wanted.is_done or wanted.owner in waiting):
            yield wanted
        waiting.add(wanted.owner)
        for task in self._tasks:
            if room <= 0:
                return
            if task in self._begun or task.is_done:
                continue
            if task.is_early and task.owner not in waiting:
                room -= 1
                yield task
            waiting.add(task.owner)

    # --- what workers say

    def _listen(self) -> None:
        """Wait until a worker says something."""
        busy = {worker.process.pipe: worker for worker in self._workers if worker and worker.task}
        for pipe in wait(list(busy)):
            if isinstance(pipe, Connection):
                self._hear(busy[pipe])

    def _hear(self, worker: _Worker) -> None:
        task = worker.task
        assert task is not None, "only busy workers are listened to"
        pipe = worker.process.pipe
        try:
            what, *about = pipe.recv()
            worker.may_be_dead = False
            if what == DONE:
                task.finish(task.receive(pipe))
        except (EOFError, OSError):
            self._bury(worker)
            return
        if what == EVENT:
            who, event, fields = about
            self._observers[who](event, fields)
            return
        worker.task = None
        worker.may_be_dead = True
        worker.peak = Peak(*about)

    def _bury(self, worker: _Worker) -> None:
        """Let others do what a worker has left. If it died idle, that says nothing of the task."""
        assert worker.task is not None
        self._workers[self._workers.index(worker)] = None
        self._begun.discard(worker.task)
        exit_code = worker.process.wait()
        worker.process.kill()
        if not worker.may_be_dead:
            worker.task.note_death(exit_code)
