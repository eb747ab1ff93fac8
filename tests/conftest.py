"""A tiny base model, labeled sentences, and a cache of features that is not the user's: for the tests of all rooms."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import pytest
import torch
from hypothesis import settings

from cotune.worker_process import WorkerProcess
from tests.support.datasets import sentences, write_csv
from tests.support.processes import preloaded
from tests.support.tiny_models import base_model

__all__ = ["base_model"]  # fixtures

# how long an example takes says something of the machine; `make test-faults` plays the property tests with "thorough"
settings.register_profile("thorough", deadline=None)
settings.register_profile("cotune", deadline=None, max_examples=40)
settings.load_profile("cotune")
_LONGEST = ("deployment", "simulations", "docs", "cli", "attacks", "client")  # rooms by CPU seconds of a test
torch.set_num_threads(1)  # tiny models: more threads only wait for each other

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it; what tests start must not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the rooms of long tests, so that workers end together (with --no-loadscope-reorder)."""
    rank = {("tests", room): place for place, room in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(tuple(item.nodeid.split("/")[:2]), len(rank)))


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A CSV of 240 labeled sentences in three classes."""
    return write_csv(tmp_path / "reviews.csv", sentences(240))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features and checks of models are cached in one folder for all processes of the session, not in the user's."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cotune-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(folder))
        yield


@pytest.fixture(autouse=True)
def _import_paths_stay() -> Iterator[None]:
    """A folder that a test leaves on `sys.path` would hide modules from later tests and their processes."""
    before = list(sys.path)
    yield
    added = [path for path in sys.path if path not in before]
    assert not added


@pytest.fixture(scope="session", autouse=True)
def _preloaded_workers() -> Iterator[None]:
    """Worker processes of cotune need not import PyTorch each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerProcess, "context", preloaded())
        yield
