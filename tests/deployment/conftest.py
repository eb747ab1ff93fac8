from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_runs import Kind, play_undisturbed
from tests.support.faults_page import Page


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    """Written to the file that the environment names."""
    file = os.environ.get("FAULTS_PAGE")
    made = Page.read(Path(file)) if file else Page()
    yield made
    if file and made.new:
        made.write(Path(file))


@pytest.fixture(scope="module")
def with_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    yield from play_undisturbed(tmp_path_factory.mktemp("database"), "with a database")
