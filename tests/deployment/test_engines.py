"""One plan on every engine: in process, and over a real SuperLink with resident nodes and with one of Flower's own among them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.engines import run_on
from tests.support.deployment import weights
from tests.support.loopback import federation, prepare_run, until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=["float32", "int4"])
def in_process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = prepare_run(tmp_path_factory.mktemp("engines") / "in-process", 2, rounds=3, codec=request.param)
    shutil.copytree(run.path, run.path.parent / "prepared")
    run_on("in-process", run)
    return run


@pytest.mark.parametrize("stock", [0, 1])
def test_the_same_model(in_process: RunFolder, tmp_path: Path, stock: int) -> None:
    """stock: how many of the two organizations run Flower's own node, which starts the ClientApp again for every message."""
    run = RunFolder(Path(shutil.copytree(in_process.path.parent / "prepared", tmp_path / "run")))
    with federation(tmp_path / "loopback", 2) as fed:
        for number, participant in enumerate(run.file.participants):
            start = fed.start_stock_node if number < stock else fed.start_node
            start(number, run.path / participant.site)
        until(lambda: fed.online() == 2)
        fed.submit(run.path)
        until(lambda: run.finished)
    assert weights(run.load()) == weights(in_process.load())
    assert all(len(entry["participants"]) == 2 for entry in run.load().history)
