"""Workers of pytest-xdist that are forked from the server of the session, which has imported what tests import.

pytest-xdist starts an interpreter for each worker, and speaks with it through its input and output. A small one takes that place here:
it hands them over to a process forked from the server, waits until that ends, and ends alike.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from multiprocessing import process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.support.fork_server import preloaded


def interpreter() -> str:
    """The command that stands in for an interpreter; what follows it is how pytest-xdist calls one: `-u -c PROGRAM`."""
    root = str(Path(__file__).parents[2])
    program = f"import sys; sys.path.insert(0, {root!r}); from tests.support.forked_workers import stand_in; stand_in()"
    return shlex.join([sys.executable, "-c", program])


def stand_in() -> None:
    """Let a forked process run the program of the last argument in this one's place."""
    worker = _start(sys.argv[-1])
    worker.join()
    sys.exit(worker.exitcode)


def _start(program: str) -> ForkServerProcess:
    ends = [Connection(0, writable=False), Connection(1, readable=False), Connection(2, readable=False)]
    worker = preloaded().Process(target=_become, args=(program, dict(os.environ), *ends))
    worker.start()
    for end in ends:
        end.close()  # who reads its output sees when the worker ends
    return worker


def _become(program: str, environ: Mapping[str, str], *ends: Connection) -> None:
    os.environ.clear()
    os.environ.update(environ)
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # the server has none
    process._parent_process = None  # type: ignore[attr-defined]  # nobody's child, as an interpreter of its own: tests look at this
    exec(program, {"__name__": "__main__"})
