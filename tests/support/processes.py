"""`cotune` in processes of its own, forked from one that has imported everything, to be killed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from cotune.plan.load import dump_plan
from cotune.plan.schema import Plan

# What the console script does, in a process that has imported everything already: forked from a server that only imports, so that a
# process that is to be killed costs a tenth of a second instead of several. `exec` is the one target that needs no import of this file.
_CONSOLE = """
import os, sys
os.environ.update({environ!r})
os.chdir({folder!r})
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1), os.dup2(log, 2)
sys.argv = ["cotune", *{arguments!r}]
import torch
torch.set_num_threads(1)
from cotune.cli.main import run
run()
"""


@pytest.fixture
def cotune(tmp_path: Path) -> Iterator[Callable[..., BaseProcess]]:
    """Starts `cotune ARGUMENTS` in a process of its own; what it prints goes to cotune.log in the folder of the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "cotune.cli.main", "cotune.cli.progress", "cotune.simulations.run"])
    started: list[BaseProcess] = []

    def start(*arguments: str | Path) -> BaseProcess:
        environ = {"COTUNE_CACHE": os.environ["COTUNE_CACHE"], "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        code = _CONSOLE.format(
            environ=environ, folder=str(tmp_path), log=str(tmp_path / "cotune.log"), arguments=[str(a) for a in arguments]
        )
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


Cotune = Callable[..., BaseProcess]
Condition = Callable[[], bool]


def written(plan: Plan, folder: Path) -> Path:
    file = folder / "plan.toml"
    file.write_text(dump_plan(plan), encoding="utf-8")
    return file


def kill_when(process: BaseProcess, condition: Condition, seconds: float = 0.0) -> None:
    """SIGKILL, that long after the condition became true."""
    deadline = time.monotonic() + 600
    while not condition():
        assert process.exitcode is None, f"the process ended with {process.exitcode} before it could be killed"
        assert time.monotonic() < deadline, "nothing to kill it for within ten minutes"
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.join()


def finish(process: BaseProcess, log: Path) -> None:
    process.join(600)
    assert process.exitcode == 0, log.read_text(encoding="utf-8")
