"""Processes that have imported everything, forked from a server that only imports, and killed at chosen moments.

A forked process costs a tenth of a second instead of the several that a new interpreter takes to import PyTorch. It kills itself
with SIGKILL, right after something that the test names has happened: at the same moment on every machine.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from cotune.plan.load import dump_plan
from cotune.plan.plan import Plan
from cotune.simulations.run import simulate
from cotune.worker_process import WorkerProcess
from tests.support.fork_server import keep_server, preloaded

Cotune = Callable[..., BaseProcess]
_observing = ExitStack()  # to the end of the process


@dataclass(frozen=True)
class Moment:
    """Right after something has happened for the nth time in a process.

    Attributes:
        what: An event of a run; "step", for a training step of an organization; "renamed", for a durable file in its place.
        fields: Of the event or the step, as far as they matter; the `path` of a file is a pattern.
    """

    what: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    nth: int = 1

    def matches(self, what: str, fields: Mapping[str, Any]) -> bool:
        if what == "renamed":
            return self.what == what and fnmatch(fields["path"], self.fields["path"])
        return self.what == what and all(fields.get(key) == value for key, value in self.fields.items())


def end_at(moment: Moment) -> None:
    """Let this process end with SIGKILL at a moment."""
    from cotune.client.local_events import observe_client
    from cotune.server.runs.events import observe_run

    left = moment.nth

    def look(what: str, fields: Mapping[str, Any]) -> None:
        nonlocal left
        left -= moment.matches(what, fields)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _observing.enter_context(observe_run(look))
    _observing.enter_context(observe_client(look))
    for name in ("replace", "rename"):
        setattr(os, name, _then(getattr(os, name), lambda target: look("renamed", {"path": str(target)})))


def _then(rename: Callable[..., None], look: Callable[[object], None]) -> Callable[..., None]:
    def renames(source: object, target: object, **options: object) -> None:
        rename(source, target, **options)
        look(target)

    return renames


class _NotedProcess(ForkServerProcess):
    """Its number is noted in the folder where its parent works: see `find_worker`."""

    def start(self) -> None:
        super().start()
        _note_of(os.getpid(), Path.cwd()).write_text(str(self.pid), encoding="ascii")


class _NotingContext(ForkServerContext):
    Process = _NotedProcess


def start_from_the_same_server() -> None:
    """Let the worker processes of this process, itself a forked one, be forked from the server that it comes from."""
    keep_server()
    WorkerProcess.context = _NotingContext()


def find_worker(parent: int, folder: Path) -> psutil.Process:
    """Find the newest worker of a process that works in a folder. Raises LookupError, psutil.NoSuchProcess."""
    note = _note_of(parent, folder)
    if not note.exists():
        raise LookupError(f"process {parent} has started no worker")
    return psutil.Process(int(note.read_text(encoding="ascii")))


def _note_of(parent: int, folder: Path) -> Path:
    return folder / f"worker-of-{parent}"


@pytest.fixture
def forked() -> Iterator[Callable[..., BaseProcess]]:
    """(function, *arguments) -> a process that calls it; whatever is left of it at the end of the test is killed."""
    context = preloaded()
    started: list[BaseProcess] = []

    def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
        process = context.Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def cotune(tmp_path: Path, forked: Callable[..., BaseProcess]) -> Cotune:
    """Starts `cotune ARGUMENTS` in a process of its own; what it prints goes to cotune.log in the folder of the test.

    killed_at: the moment at which it ends itself with SIGKILL.
    """

    def start(*arguments: str | Path, killed_at: Moment | None = None) -> BaseProcess:
        environ = {"COTUNE_CACHE": os.environ["COTUNE_CACHE"], "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        return forked(_console, [str(word) for word in arguments], environ, tmp_path, killed_at)

    return start


def _console(arguments: list[str], environ: Mapping[str, str], folder: Path, killed_at: Moment | None) -> None:
    """What the console script does."""
    os.environ.update(environ)
    os.chdir(folder)
    log = os.open(folder / "cotune.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["cotune", *arguments]
    import torch

    from cotune.cli.main import run

    torch.set_num_threads(1)
    start_from_the_same_server()
    if killed_at is not None:
        end_at(killed_at)
    run()


def kill_at(cotune: Cotune, moment: Moment, *arguments: str | Path) -> None:
    """Run `cotune ARGUMENTS` until it ends itself there. Raises AssertionError where it ends otherwise."""
    process = cotune(*arguments, killed_at=moment)
    process.join(600)
    assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode}: expected to be killed at {moment}"


def written(plan: Plan, folder: Path) -> Path:
    file = folder / "plan.toml"
    file.write_text(dump_plan(plan), encoding="utf-8")
    return file


def finish(process: BaseProcess, log: Path) -> None:
    process.join(600)
    assert process.exitcode == 0, log.read_text(encoding="utf-8")


def play_killed(cotune: Cotune, plan: Plan, run: Path, moments: Iterable[Moment]) -> None:
    """Play a plan in the folder of a run, killed at each moment and resumed, to its end."""
    arguments: tuple[str | Path, ...] = ("simulate", written(plan, run.parent), "--out", run, "--device", "cpu")
    for moment in moments:
        kill_at(cotune, moment, *arguments)
        arguments = ("simulate", "--resume", run)
    finish(cotune(*arguments), run.parent / "cotune.log")


_IN_EITHER_ROUND = (
    Moment("step", {"round": 1, "organization": "org-2"}, nth=2),
    Moment("update_received", {"round": 2, "organization": "org-1"}),
)


def play_whole_and_killed(
    cotune: Cotune, plan: Plan, folder: Path, moments: Iterable[Moment] = _IN_EITHER_ROUND
) -> tuple[Path, Path]:
    """Play a plan of two organizations undisturbed, and killed at each moment; return the folders of both runs.

    moments: By default in either of two rounds.
    """
    whole = folder / "whole"
    run = folder / "other"  # as long as the other's: a request names the folder, and its bytes are counted
    simulate(plan, whole, device="cpu")
    play_killed(cotune, plan, run, moments)
    return whole, run


class _ListedProcess(ForkServerProcess):
    """It is in the list of all that were started."""

    started: ClassVar[list[ForkServerProcess]] = []

    def start(self) -> None:
        super().start()
        self.started.append(self)


class _ListingContext(ForkServerContext):
    Process = _ListedProcess


@pytest.fixture
def started_workers(monkeypatch: pytest.MonkeyPatch) -> list[ForkServerProcess]:
    """The worker processes that this one starts during the test, in their order."""
    preloaded()
    _ListedProcess.started.clear()
    monkeypatch.setattr(WorkerProcess, "context", _ListingContext())
    return _ListedProcess.started
