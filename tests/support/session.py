"""What every process that runs tests has: the base models, a cache that is not the user's, and preloaded worker processes."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cotune.data.inputs import chat_template
from cotune.models import record_independence
from cotune.models.base import load
from cotune.worker_process import WorkerProcess
from tests.support.chat_processes import ChatProcess
from tests.support.datasets import sentences, write_csv
from tests.support.fork_server import preloaded
from tests.support.independence import VerdictsByContent
from tests.support.loaded_weights import WeightsByContent
from tests.support.tiny_models import base_model

__all__ = ["base_model"]  # fixtures

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A CSV of 240 labeled sentences in three classes."""
    return write_csv(tmp_path / "reviews.csv", sentences(240))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features and checks of models are cached in one folder for all processes of the session, not in the user's."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # its parent has named a folder
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cotune-cache"))
        yield


@pytest.fixture(autouse=True)
def _import_paths_stay() -> Iterator[None]:
    """A folder that a test leaves on `sys.path` would hide modules from later tests and their processes.

    It is looked at when `monkeypatch` has undone what it did: fixtures of every test that use it begin after this one.
    """
    before = list(sys.path)
    yield
    added = [path for path in sys.path if path not in before]
    assert not added


@pytest.fixture(scope="session", autouse=True)
def _preloaded_workers() -> Iterator[None]:
    """Worker processes of cotune need not import PyTorch each, and those that write chats need not import transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerProcess, "context", preloaded())
        patch.setattr(chat_template, "_new_process", ChatProcess)
        yield


@pytest.fixture(scope="session", autouse=True)
def _equal_models_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "read_weights", WeightsByContent(load.read_weights))
        yield


@pytest.fixture
def small_heap() -> None:
    """Collections of garbage look only at what the test has made; what was there before stays out of them, as after collection."""
    gc.freeze()


@pytest.fixture(scope="session")
def verdicts() -> VerdictsByContent:
    """Shared by the tests of a process; rooms in which somebody mixes records have others."""
    return VerdictsByContent()


@pytest.fixture(autouse=True)
def _equal_models_are_tried_once(_import_paths_stay: None, verdicts: VerdictsByContent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether records mix is tried for a second with every model that is loaded, and most tests load the same tiny ones."""
    monkeypatch.setattr(record_independence, "_mixing", verdicts)
