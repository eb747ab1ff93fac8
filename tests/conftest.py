"""How tests are ordered and set up. What they share is in tests/support; the fixtures of all of them in tests/support/session.py."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models and matrices: more threads only wait for each other, and burn CPU

import pytest
from hypothesis import settings

from tests.support.fork_server import share_server
from tests.support.forked_workers import interpreter

# how long an example takes says something of the machine; `make test-faults` plays the property tests with "thorough"
settings.register_profile("thorough", deadline=None)
settings.register_profile("cotune", deadline=None, max_examples=25)
settings.load_profile("cotune")
# by CPU seconds, but tests that mostly wait for processes and deadlines not beside each other, nor last; "test_": at the top level
_ORDER = (
    *("deployment/test_faults", "simulations", "deployment", "docs", "server/rounds/test", "cli", "server/rounds/updates"),
    *("attacks", "server", "client", "test_", "models", "privacy", "data"),
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it; what tests start must not


def pytest_configure(config: pytest.Config) -> None:
    """Load what tests share; a process that only hands tests out to the workers of pytest-xdist does without PyTorch."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.support.session")
    else:
        os.environ["COTUNE_CACHE"] = tempfile.mkdtemp(prefix="cotune-tests-")
        share_server()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache that all workers of the session shared."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["COTUNE_CACHE"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Fork the workers from the server, so that not each of them imports what tests import."""
    for spec in specs:
        spec.python = interpreter()


def pytest_xdist_auto_num_workers() -> int:
    """Start more workers than there are cores: tests that start processes wait for them more than they compute."""
    return (os.cpu_count() or 2) * 3 // 2


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Keep the garbage collector from what lasts: the libraries, and the tests themselves."""
    session.config.args = _begin_elsewhere(session.config)
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(50_000, 20, 20)  # objects: tests make few cycles, and looking for them takes a thirtieth of the time


def _begin_elsewhere(config: pytest.Config) -> list[str]:
    """Let each worker begin to collect at another place, so that not every one compiles all tests; later ones find them compiled."""
    tests = Path(__file__).parent
    if not hasattr(config, "workerinput") or [Path(each).resolve() for each in config.args] != [tests]:
        return config.args
    places = sorted(str(path) for path in tests.iterdir() if path.is_dir() or path.match("test_*.py"))
    worker = int(config.workerinput["workerid"].removeprefix("gw"))
    first = worker * len(places) // config.workerinput["workercount"] % len(places)
    return places[first:] + places[:first]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the rooms of long tests, so that workers end together (with --no-loadscope-reorder); the same in every worker."""

    def place(item: pytest.Item) -> tuple[int, str]:
        file = item.nodeid.partition("::")[0]
        inside = file.removeprefix("tests/")
        return next((rank for rank, start in enumerate(_ORDER) if inside.startswith(start)), len(_ORDER)), file

    items.sort(key=place)
