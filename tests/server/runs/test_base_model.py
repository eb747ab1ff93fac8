"""The base model of a run is where the coordinator has it; the plan that members see says nothing of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.client.site_folder import SiteFile
from cotune.client.site_setup import find_site_base
from cotune.errors import ModelError
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.server.deployment.federation import FederationFolder, write_config
from cotune.server.deployment.new_run import create_run
from cotune.server.runs.run_model import load_run_model
from tests.support.federations import founded


@pytest.fixture
def fed(tmp_path: Path, base_model: Callable[[str], Path]) -> FederationFolder:
    return founded(tmp_path / "fed", base_model("bert"), "north", "south")


def test_run_has_federation_plan_and_coordinators_base_folder(fed: FederationFolder) -> None:
    run = create_run(fed)
    assert run.plan.plan_id == fed.invitation.plan.plan_id
    assert "/" not in run.plan.model.base
    assert load_run_model(run).loaded.folder.content_hash == run.plan.model.base_hash


def test_a_folder_that_set_names_is_not_told_either(fed: FederationFolder, base_model: Callable[[str], Path]) -> None:
    other = base_model("distilbert").resolve()
    wanted = find_base(ModelConfig(base=str(other)))
    pins = [f"model.{key}={value}" for key, value in wanted.pins.items()]
    run = create_run(fed, [f"model.base={other}", *pins])
    assert run.plan.model.base == f"folder:{other.name}"
    assert load_run_model(run).loaded.folder.path == other


def test_a_federation_of_before_keeps_its_plan(fed: FederationFolder) -> None:
    """Its members have approved a plan that names the folder."""
    place = fed.config.base
    text = (fed.path / "plan.toml").read_text(encoding="utf-8")
    (fed.path / "plan.toml").write_text(text.replace(fed.plan.model.base, str(place)), encoding="utf-8")
    write_config(fed.path, fed.config.model_copy(update={"base": None}))
    again = FederationFolder(fed.path)
    run = create_run(again)
    assert run.plan.plan_id == again.plan.plan_id
    assert run.plan.model.base == str(place)
    assert load_run_model(run).loaded.folder.path == place


def test_member_names_its_own_copy_and_nothing_is_fetched(
    fed: FederationFolder, base_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name in the working directory is not taken, nor what the hub has under it."""
    place = base_model("bert").resolve()
    monkeypatch.chdir(place.parent)
    plan = fed.invitation.plan
    with pytest.raises(ModelError, match=r"is a folder that only its coordinator has.*--model FOLDER"):
        find_site_base(plan, SiteFile(organization="north"))
    assert find_site_base(plan, SiteFile(organization="north", base=place)).content_hash == plan.model.base_hash
