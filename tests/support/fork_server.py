"""The server from which the processes of tests are forked: it has imported, once, what they need.

Under pytest-xdist the process that hands tests out starts it for all workers; otherwise it starts when it is needed first. This
module imports nothing heavy, for that process needs none of it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

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
    "dp_accounting",
    "peft",
    "cotune.cli.simulate",
    "tests.support.warm",
)
CACHE = "cotune-cache"  # in the temporary folder of the session: what all of its processes keep
_ADDRESS = "COTUNE_TESTS_FORK_SERVER"
_server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]


def preloaded() -> ForkServerContext:
    """Starts processes from a server that has imported what they need, and shares nothing else with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    if _ADDRESS in os.environ and _server._forkserver_address != os.environ[_ADDRESS]:
        _server._forkserver_address = os.environ[_ADDRESS]
        _server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # it lives as long as the process that started it
        start_from_the_same_server()
    return context


def start_for_workers(cache: Path) -> None:
    """Start the server for the workers that this process will start.

    Args:
        cache: COTUNE_CACHE of all processes that come from the server.
    """
    if sys.version_info >= (3, 14):  # it asks for a key that its own process alone has: each worker has a server
        return
    preloaded()
    before = dict(os.environ)
    os.environ["COTUNE_CACHE"] = str(cache)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    os.environ[_ADDRESS] = _server._forkserver_address


def start_from_the_same_server() -> None:
    """Let this process start others from the server whose address it knows: CPython would start another server."""
    _server.ensure_running = resource_tracker.ensure_running
