from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.data.dataset import DatasetManifest
from cotune.errors import CotuneError
from cotune.server.deployment.new_run import create_run
from cotune.server.runs.run_folder import pick_run_folder
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.federations import founded

Base = Callable[[str], Path]


def test_run_has_the_members_in_the_order_of_invitation(tmp_path: Path, base_model: Base) -> None:
    federation = founded(tmp_path / "fed", base_model("bert"), "zurich", "basel", "gone", "aarau")
    federation.members.revoke("gone")
    run = create_run(federation)
    assert [who.name for who in run.file.participants] == ["zurich", "basel", "aarau"]
    assert {who.site for who in run.file.participants} == {""}
    assert (run.file.engine, run.file.device, run.file.federation) == ("superlink", "cpu", str(tmp_path / "fed"))
    assert run.plan.plan_id == federation.plan.plan_id
    assert list(federation.runs()) == [run.path]
    assert not (run.path / "test").exists()
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_all_records_of_the_coordinator_are_the_test_set(tmp_path: Path, base_model: Base) -> None:
    records = write_csv(tmp_path / "test.csv", sentences(37))
    run = create_run(founded(tmp_path / "fed", base_model("bert"), "a", test=records))
    assert len(DatasetManifest.read(run.path / "test" / "data.json", run.plan.labels)) == 37


def test_nobody_need_say_whose_the_test_records_are(tmp_path: Path, base_model: Base) -> None:
    records = write_csv(tmp_path / "test.csv", sentences(37))
    privacy = {"unit": "patient_id", "max_records": 2}
    run = create_run(founded(tmp_path / "fed", base_model("bert"), "a", test=records, privacy=privacy))
    assert run.plan.data.unit == "patient_id"
    assert len(DatasetManifest.read(run.path / "test" / "data.json", run.plan.labels)) == 37


def test_overrides_make_another_plan_and_a_name_another_folder(tmp_path: Path, base_model: Base) -> None:
    federation = founded(tmp_path / "fed", base_model("bert"), "a")
    run = create_run(federation, ["rounds=3", "local.steps=4"], "second")
    assert (run.plan.rounds, run.plan.local.steps, run.path.name) == (3, 4, "second")
    assert run.plan.plan_id != federation.plan.plan_id


@pytest.mark.parametrize(
    ("names", "changes", "overrides", "name", "sentence"),
    [
        ((), {}, [], None, "no members: invite one first"),
        (("a",), {"server": {"sample_size": 2}}, [], None, "sample_size = 2 and 1 organizations"),
        (("a", "b"), {}, ["strategy.fusion=krum"], None, "krum"),
        (("a",), {}, ["strategy=greedy_soup", "validation_fraction=0.1"], None, "judges updates by records of the server"),
        (("a",), {}, ["roundz=3"], None, "did you mean 'rounds'"),
        (("a",), {}, [], "../elsewhere", "cannot be the name of a run"),
    ],
)
def test_what_cannot_be_run_is_refused_before_there_is_a_folder(
    tmp_path: Path,
    base_model: Base,
    names: tuple[str, ...],
    changes: dict[str, Any],
    overrides: list[str],
    name: str | None,
    sentence: str,
) -> None:
    federation = founded(tmp_path / "fed", base_model("bert"), *names, **changes)
    with pytest.raises(CotuneError, match=sentence):
        create_run(federation, overrides, name)
    assert not list((federation.path / "runs").iterdir())


def test_test_records_of_a_class_that_the_plan_lacks_are_refused(tmp_path: Path, base_model: Base) -> None:
    records = write_csv(tmp_path / "test.csv", sentences(37))
    federation = founded(tmp_path / "fed", base_model("bert"), "a", test=records)
    with fails_with("data.unknown_class"):
        create_run(federation, ['labels=["bad", "good"]'])


def test_a_name_that_is_taken_is_refused(tmp_path: Path, base_model: Base) -> None:
    federation = founded(tmp_path / "fed", base_model("bert"), "a")
    create_run(federation, name="one")
    with fails_with("run.folder_exists", "one"):
        create_run(federation, name="one")


def test_folders_that_are_made_in_one_second_have_two_names(tmp_path: Path) -> None:
    first = pick_run_folder("a plan", tmp_path)
    first.mkdir()
    assert pick_run_folder("a plan", tmp_path) != first
    assert first.name.endswith("-a-plan")
