"""The server from which the tests' processes are forked: it has imported what they need, and runs nothing itself.

One serves all workers of pytest-xdist, which come from it themselves. The process that hands tests out to them starts it, and imports
none of that itself.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any

_ADDRESS = "COTUNE_TESTS_FORK_SERVER"  # environment variable: of the shared server
_PRELOADED = (
    "pytest",
    "cotune.cli.main",
    "cotune.cli.progress",
    "cotune.simulations.run",
    "cotune.simulations.comparison.compare",
    "cotune.client.app",
    "cotune.data.inputs.chat_worker",
    "opacus",
    "transformers.models.bert.modeling_bert",
    "scipy.stats",
    "cotune.privacy.accounting.loss_distribution",
    "scipy.optimize",
    "cotune.cli.simulate",
    "tests.support.warm",
    "peft",
    "tests.support.frozen_heap",
)
_server: Any = forkserver._forkserver  # type: ignore[attr-defined]


def preloaded(address: str | None = None) -> ForkServerContext:
    """Start processes from the server, which shares nothing else with this process. They have the server's environment.

    address: of a running one; of that of the session by default.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    if address := address or os.environ.get(_ADDRESS):
        _connect(address)
    return context


def find_address() -> str:
    """The address of the session's server, by which other programs can start processes from it."""
    preloaded()
    _server.ensure_running()
    return str(_server._forkserver_address)


def share_server() -> None:
    """Start the server for the workers of this process; it ends with this process. Its environment is that of now.

    What its processes print, unless a test looks at it, is not shown between the results; without workers it is, with the test.
    """
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    with _silence():
        forkserver.ensure_running()
    os.environ[_ADDRESS] = _server._forkserver_address


@contextmanager
def _silence() -> Iterator[None]:
    """Give processes that are started within the block an output that nobody reads."""
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, saved in kept.items():
            os.dup2(saved, number)
            os.close(saved)
        os.close(nowhere)


def keep_server() -> None:
    """Start processes from the server whose address is known here, such as that which forked this process.

    CPython knows the address and starts another server all the same.
    """
    _server.ensure_running = resource_tracker.ensure_running


@cache
def _connect(address: str) -> None:
    _server._forkserver_address = address
    # in place of the pipe whose end tells a server that no process needs it any more
    _server._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)
    keep_server()
