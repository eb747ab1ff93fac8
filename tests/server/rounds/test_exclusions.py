"""Refused updates are counted over finished rounds and failed ones."""

from __future__ import annotations

import pytest

from cotune.server.runs.exclusions import find_excluded, record_strikes
from cotune.server.runs.run_folder import RunFolder
from tests.support.events import round_entry
from tests.support.failures import fails_with
from tests.support.organizations import adding
from tests.support.rounds import play, wrong_shape
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import real, told, wild


def test_so_many_refused_updates_leave_an_organization_out(new_run: NewRun) -> None:
    history = [round_entry(quarantined=names) for names in (["a", "b"], ["a"], [], ["c", "a", "b"])]
    for strikes, out in ((0, []), (1, ["a", "b", "c"]), (2, ["a", "b"]), (3, ["a"]), (4, [])):
        assert find_excluded(new_run(server={"strikes": strikes}), history) == out


def test_those_of_failed_rounds_count_as_well(new_run: NewRun) -> None:
    folder = new_run(server={"strikes": 3})
    for names in ([], ["b"], ["b", "a"]):
        record_strikes(folder, names)
    assert find_excluded(RunFolder(folder.path), []) == []
    assert find_excluded(RunFolder(folder.path), [round_entry(quarantined=["b", "c"])]) == ["b"]


def test_run_needing_everybody_goes_on_without_the_excluded(new_run: NewRun) -> None:
    """Each attempt fails, as the quorum does, until it has as many strikes as the plan allows."""
    folder = real(new_run("org-1", "org-2", rounds=2, server={"quorum": 1.0, "strikes": 2}))
    answers = {"org-1": adding(1.0), "org-2": wrong_shape}
    for _ in range(2):
        with fails_with("run.no_quorum", "1", "1", "2"):
            play(folder, wild(folder, answers))
    progress = play(folder, wild(folder, answers))
    assert [entry["participants"] for entry in progress.history] == [["org-1"]] * 2
    assert [entry["excluded"] for entry in progress.history] == [["org-2"]] * 2
    assert [event["organization"] for event in told(folder, "client_excluded")] == ["org-2"]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "many"}', "\x00"])
def test_a_damaged_file(new_run: NewRun, content: str) -> None:
    folder = new_run()
    (folder.path / "strikes.json").write_text(content)
    with fails_with("run.damaged_document", "strikes.json") as error:
        find_excluded(folder, [])
    assert error.value.code == "run.damaged_document"
