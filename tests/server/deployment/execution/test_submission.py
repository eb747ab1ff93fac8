from __future__ import annotations

from pathlib import Path

import pytest

from cotune.errors import RunError
from cotune.flower.control_client import FEDERATION_VARIABLE, find_run_folder, get_run_name
from cotune.server.deployment.execution import supervisor
from cotune.server.deployment.federation import FederationFolder
from tests.support.federations import founded


def test_run_is_found_by_the_name_given_to_the_superlink(tmp_path: Path) -> None:
    run = tmp_path / "fed" / "runs" / "20260101-toy"
    told = get_run_name(run)
    assert "/" not in told
    assert find_run_folder(told, {FEDERATION_VARIABLE: str(tmp_path / "fed")}) == run


def test_what_the_executor_starts_knows_the_federation(folder: FederationFolder) -> None:
    assert supervisor._build_environment(folder)[FEDERATION_VARIABLE] == str(folder.path)


@pytest.fixture
def folder(tmp_path: Path, base_model: object) -> FederationFolder:
    assert callable(base_model)
    return founded(tmp_path / "fed", base_model("bert"))


@pytest.mark.parametrize("told", ["", ".", "..", "../x", "/etc", "a/b"])
def test_a_federation_plays_nothing_but_its_runs(told: str, tmp_path: Path) -> None:
    with pytest.raises(RunError):
        find_run_folder(told, {FEDERATION_VARIABLE: str(tmp_path)})


def test_a_simulation_names_the_folder_itself(tmp_path: Path) -> None:
    assert find_run_folder(str(tmp_path), {}) == tmp_path
