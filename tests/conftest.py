"""How tests are ordered and set up. What they share is in tests/support; the fixtures of all of them in tests/support/session.py."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models and matrices: more threads only wait for each other, and burn CPU

import pytest
from hypothesis import settings

# how long an example takes says something of the machine; `make test-faults` plays the property tests with "thorough"
settings.register_profile("thorough", deadline=None)
settings.register_profile("cotune", deadline=None, max_examples=40)
settings.load_profile("cotune")
_LONGEST = ("deployment", "simulations", "docs", "cli", "attacks", "client")  # rooms by CPU seconds of a test

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it; what tests start must not


def pytest_configure(config: pytest.Config) -> None:
    """Load what tests share; a process that only hands tests out to the workers of pytest-xdist does without PyTorch."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.support.session")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the server from which tests fork processes once for all workers of pytest-xdist."""
    if not hasattr(session.config, "workerinput") and session.config.getoption("dist", "no") != "no":
        from tests.support.fork_server import CACHE, start_for_workers

        start_for_workers(session.config._tmp_path_factory.getbasetemp() / CACHE)  # type: ignore[attr-defined]


def pytest_xdist_auto_num_workers() -> int:
    """Start more workers than there are cores: tests that start processes wait for them more than they compute."""
    return (os.cpu_count() or 2) * 3 // 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the rooms of long tests, so that workers end together (with --no-loadscope-reorder)."""
    rank = {("tests", room): place for place, room in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(tuple(item.nodeid.split("/")[:2]), len(rank)))
