"""Tasks for worker processes, with real processes that wait for files, so that a test decides who is ready first."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from cotune.simulations.workers.pool import DONE, EVENT, Peak, Task, WorkerPool
from cotune.worker_process import receive_all
from tests.support.failures import fails_with
from tests.support.processes import started_workers

__all__ = ["started_workers"]  # fixtures

Begun = list[tuple[str, int]]  # (task, process)


def do(pipe: Connection, folder: Path) -> None:
    """Answer each text once a file of its name is there; "die" ends the process, once or ever again."""
    for text in receive_all(pipe):
        pipe.send((EVENT, "test", "begun", {"text": text, "pid": os.getpid()}))
        if text == "die" or (text == "die once" and not (folder / text).exists()):
            (folder / text).touch()
            os._exit(3)
        while not (folder / text).exists():
            time.sleep(0.001)
        pipe.send((DONE, 5, 7))
        pipe.send(f"{text} done")


def task(text: str, owner: object = None, *, is_early: bool = True) -> Task:
    return Task(text, owner or text, lambda pipe: pipe.send(text), lambda pipe: pipe.recv(), is_early)


class Pool(WorkerPool):
    """With what has begun so far; ready: files that make tasks ready once a task has begun."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.begun: Begun = []
        self.ready: dict[str, list[str]] = {}
        self.folder = folder
        super().__init__(do, [(folder,)] * workers, {"test": self._note})

    def _note(self, event: str, fields: dict[str, Any]) -> None:
        self.begun.append((fields["text"], fields["pid"]))
        for text in self.ready.get(fields["text"], []):
            (self.folder / text).touch()

    def put_all(self, *tasks: Task) -> list[Task]:
        for each in tasks:
            self.put(each)
        return list(tasks)

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.begun]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Callable[[int], Pool]]:
    """workers -> a pool."""
    made: list[Pool] = []

    def make(workers: int) -> Pool:
        made.append(Pool(tmp_path, workers))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_results_come_in_the_order_they_are_asked_for(pool: Callable[[int], Pool]) -> None:
    two = pool(2)
    tasks = two.put_all(task("a"), task("b"), task("c"))
    two.ready = {"b": ["b"], "c": ["c", "a"]}  # a is ready last of all, and asked for first
    assert [two.take(each, ahead=4) for each in tasks] == ["a done", "b done", "c done"]
    assert sorted(two.texts) == ["a", "b", "c"]
    assert two.texts.index("b") < two.texts.index("c")
    assert two.peak == Peak(10, 14)


def test_no_more_is_begun_than_may_wait(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    two = pool(2)
    tasks = two.put_all(*(task(text) for text in "abcde"))
    two.ready = {text: [text] for text in "bcde"}
    two.ready["c"] = ["c", "a"]
    assert two.take(tasks[0], ahead=3) == "a done"
    assert sorted(two.texts) == ["a", "b", "c"]
    assert [two.take(each, ahead=3) for each in tasks[1:]] == [f"{text} done" for text in "bcde"]


def test_what_may_not_be_needed_is_begun_when_it_is_asked_for(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    two = pool(2)
    sure, spare, further = two.put_all(task("sure"), task("spare", is_early=False), task("further"))
    for text in ("sure", "spare", "further"):
        (tmp_path / text).touch()
    assert two.take(sure, ahead=4) == "sure done"
    assert two.take(further, ahead=4) == "further done"
    assert sorted(two.texts) == ["further", "sure"]
    assert two.take(spare, ahead=4) == "spare done"


def test_dropped_tasks_are_not_begun(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    one = pool(1)
    first, dropped, last = one.put_all(task("first"), task("dropped"), task("last"))
    one.drop(dropped)
    (tmp_path / "first").touch()
    (tmp_path / "last").touch()
    assert [one.take(each, ahead=4) for each in (first, last)] == ["first done", "last done"]
    assert one.texts == ["first", "last"]


def test_tasks_of_one_owner_take_turns(pool: Callable[[int], Pool]) -> None:
    two = pool(2)
    tasks = two.put_all(task("a1", "a"), task("a2", "a"), task("b1", "b"))
    two.ready = {"b1": ["a1"], "a2": ["a2", "b1"]}  # were a2 begun before a1 is done, b1 would not be
    assert [two.take(each, ahead=4) for each in tasks] == ["a1 done", "a2 done", "b1 done"]
    assert sorted(two.texts[:2]) == ["a1", "b1"]
    assert dict(two.begun)["a1"] == dict(two.begun)["a2"] != dict(two.begun)["b1"]


def test_an_idle_worker_takes_over_from_a_busy_one(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    two = pool(2)
    (tmp_path / "a1").touch()
    (tmp_path / "b1").touch()
    for each in two.put_all(task("a1", "a"), task("b1", "b")):
        two.take(each, ahead=2)
    workers = dict(two.begun)
    slow, other = two.put_all(task("a2", "a"), task("c", "c"))
    two.ready = {"c": ["c", "a2"]}
    assert two.take(slow, ahead=2) == "a2 done"
    assert dict(two.begun)["a2"] == workers["a1"]
    assert dict(two.begun)["c"] == workers["b1"]
    assert two.take(other, ahead=2) == "c done"


def test_no_more_workers_start_than_have_work(
    pool: Callable[[int], Pool], tmp_path: Path, started_workers: list[ForkServerProcess]
) -> None:
    two = pool(2)
    for text in "ab":
        (tmp_path / text).touch()
        (each,) = two.put_all(task(text))
        assert two.take(each, ahead=4) == f"{text} done"
    assert len(started_workers) == 1


def test_a_task_whose_worker_dies_is_done_again(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    two = pool(2)
    (tmp_path / "a").touch()
    dies, other = two.put_all(task("die once"), task("a"))
    assert [two.take(each, ahead=4) for each in (other, dies)] == ["a done", "die once done"]
    assert two.texts.count("die once") == 2


def test_a_task_that_kills_its_workers_fails_and_others_do_not(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    two = pool(2)
    (tmp_path / "a").touch()
    deadly, other = two.put_all(task("die"), task("a"))
    assert two.take(other, ahead=4) == "a done"
    with fails_with("run.worker_died", "die", "3"):
        two.take(deadly, ahead=4)
    assert two.texts.count("die") == 2
    (after,) = two.put_all(task("a"))
    assert two.take(after, ahead=4) == "a done"


def test_deaths_of_idle_workers_do_not_count(
    pool: Callable[[int], Pool], tmp_path: Path, started_workers: list[ForkServerProcess]
) -> None:
    two = pool(2)
    for text in "ab":
        (tmp_path / text).touch()
    two.ready = {}
    for each in two.put_all(task("a"), task("b")):
        two.take(each, ahead=2)
    for process in started_workers:
        process.kill()
    (again,) = two.put_all(task("a"))
    assert two.take(again, ahead=2) == "a done"
    assert len(started_workers) > 2


def test_close_ends_all_workers_whatever_they_do(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    two = pool(2)
    (tmp_path / "a").touch()
    _, ready = two.put_all(task("never"), task("a"))
    assert two.take(ready, ahead=2) == "a done"
    two.close()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for _, pid in two.begun)
