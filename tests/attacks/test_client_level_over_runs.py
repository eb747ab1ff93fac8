"""Attack: a federation is run again and again, and each run's client-level ε starts at 0.

The account was a file in the folder of each run: ten runs of one federation with ε = 8 each spent 8 by their own accounts, and by
composition far more. Now all runs of a federation charge one account, and the next run ends before a round that does not fit.
The account's limit was then that of whichever plan came last: `--set client_privacy.epsilon=40` raised it. Now the first charge
fixes the limit and δ. A run whose folder was deleted and whose name was used again counted as one run with one fixed plan; runs
are known by a random id.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.server.rounds.client_dp import ClientLevelPrivacy
from cotune.server.runs.client_privacy import open_client_account
from cotune.server.runs.run_folder import Participant, Progress, RunFile, RunFolder
from tests.support.run_folders import NewRun

UNIFORM = {"weighting": "uniform"}


def run_of(new_run: NewRun, home: Path, name: str, **client_privacy: Any) -> RunFolder:
    """A real run of the federation in `home`, with the plan of a made-up one."""
    plan = new_run("a", "b", client_privacy={"epsilon": 8.0, "clip_norm": 1.0, **client_privacy}, strategy=UNIFORM).plan
    people = (Participant(name="a"), Participant(name="b"))
    file = RunFile(run=name, created="now", engine="superlink", participants=people, federation=str(home))
    return RunFolder.create(home / "runs" / name, plan, file)


def play(folder: RunFolder) -> int:
    """Charges every round that may be played; how many were."""
    privacy = ClientLevelPrivacy.of(folder)
    assert privacy is not None
    for round in range(1, folder.plan.rounds + 1):
        if privacy.reason_to_stop(Progress(round=round - 1, state={})):
            return round - 1
        privacy.charge(round)
    return folder.plan.rounds


def test_a_second_run_of_a_federation_does_not_start_at_zero(
    new_run: NewRun,
    tmp_path: Path,
) -> None:
    home = tmp_path / "federation"
    first = run_of(new_run, home, "first")
    assert play(first) == first.plan.rounds
    second = run_of(new_run, home, "second")
    assert play(second) == 0
    privacy = ClientLevelPrivacy.of(second)
    assert privacy is not None
    with pytest.raises(PrivacyError):
        privacy.charge(1)


def test_more_for_all_runs_together_is_said_in_the_plan_and_kept(new_run: NewRun, tmp_path: Path) -> None:
    home = tmp_path / "federation"
    played = [play(run_of(new_run, home, f"run-{i}", epsilon_total=20.0)) for i in range(6)]
    assert played[1] > 0
    assert played[-1] == 0
    last = run_of(new_run, home, "last", epsilon_total=20.0)
    assert last.plan.client_privacy is not None
    account = open_client_account(last, last.plan.client_privacy)
    everything = [steps for charged in account.runs().values() for _, steps in charged]
    assert epsilon(everything, 1e-5) <= account.spent_in_all_runs() <= 20.0
    assert all(isinstance(steps, Steps) for steps in everything)


@pytest.mark.parametrize("later", [{"epsilon": 40.0}, {"epsilon_total": 40.0}, {"delta": 1e-6}, {"delta": 1e-4}])
def test_a_later_plan_does_not_raise_the_limit(new_run: NewRun, tmp_path: Path, later: dict[str, float]) -> None:
    home = tmp_path / "federation"
    play(run_of(new_run, home, "first"))
    before = (home / "client-privacy.jsonl").read_bytes()
    second = run_of(new_run, home, "second", **later)
    with pytest.raises(PrivacyError):
        ClientLevelPrivacy.of(second)
    assert (home / "client-privacy.jsonl").read_bytes() == before


def test_a_name_that_is_used_again_is_another_run(new_run: NewRun, tmp_path: Path) -> None:
    home = tmp_path / "federation"
    first = run_of(new_run, home, "name", epsilon_total=20.0)
    played = play(first)
    shutil.rmtree(first.path)
    again = run_of(new_run, home, "name", epsilon_total=20.0)
    assert again.plan.client_privacy is not None
    account = open_client_account(again, again.plan.client_privacy)
    assert account.charges() == []
    assert play(again) > 0
    assert next(len(charged) for charged in account.runs().values()) == played
    assert len(account.runs()) == 2


def test_a_run_from_before_runs_had_ids_keeps_its_own_account(new_run: NewRun, tmp_path: Path) -> None:
    folder = run_of(new_run, tmp_path / "federation", "old")
    about = json.loads((folder.path / "run.json").read_text())
    del about["id"]
    (folder.path / "run.json").write_text(json.dumps(about))
    old = RunFolder(folder.path)
    play(old)
    assert (old.path / "client-privacy.jsonl").exists()
    assert not (tmp_path / "federation" / "client-privacy.jsonl").exists()
