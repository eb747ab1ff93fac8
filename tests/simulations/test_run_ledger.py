"""The ledgers of a simulated run in one file: what they cost, what each organization sees, and that changes are found."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cotune.client.ledger_report import export_ledger, summarize_ledger
from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.ledger.ledger import Ledger, create_run_ledger
from cotune.privacy.ledger.verification import verify_export
from cotune.server.runs.events import observe_run
from cotune.simulations.prepare import RUN_LEDGER
from cotune.simulations.run import simulate
from tests.support.commits import counted_commits
from tests.support.failures import fails_with
from tests.support.simulations import NewPlan

ROUNDS = 3
CLIENTS = 2
RECORDS = [bytes([i]) * 16 for i in range(5)]
ROUND = Steps(1.0, 0.05, 20)


def small(toy_plan: NewPlan, privacy: Any) -> Plan:
    return toy_plan(privacy=privacy, rounds=ROUNDS, local={"batch_size": 0.2, "learning_rate": 1.0, "steps": 2})


@pytest.mark.parametrize(("privacy", "most"), [({"epsilon": 2.0}, 2), ("none", 1)])
def test_a_client_round_has_at_most_two_transactions(toy_plan: NewPlan, tmp_path: Path, privacy: Any, most: int) -> None:
    written: list[int] = []
    with counted_commits() as commits:

        def note(event: str, fields: dict[str, Any]) -> None:
            if event == "round_finished":
                written.append(len(commits.files))

        with observe_run(note):
            simulate(small(toy_plan, privacy), tmp_path / "run", device="cpu")
    per_round = [after - before for before, after in pairwise([0, *written])]
    assert per_round == [(most + 1) * CLIENTS, *[most * CLIENTS] * (ROUNDS - 1)]  # in the first the data set and the key
    assert set(commits.files) == {tmp_path / "run" / RUN_LEDGER}


def test_an_organization_sees_its_own_ledger_alone(toy_plan: NewPlan, tmp_path: Path) -> None:
    run = simulate(small(toy_plan, {"epsilon": 2.0}), tmp_path / "run", device="cpu").folder
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    heads = set()
    for name in ("org-1", "org-2"):
        site = Site(moved / "sites" / name)
        [table] = summarize_ledger(site)["collections"]
        assert [len(data["shares_records_with"]) for data in table["data_sets"]] == [0]
        assert [entry.kind for entry in site.ledger().entries()] == ["key", "data", *["reserve", "settle", "disclosure"] * ROUNDS]
        exported = export_ledger(site)
        assert verify_export(exported)["valid"]
        heads.add(exported["head"])
    assert len(heads) == 2


def test_a_changed_ledger_of_a_run_is_refused(toy_plan: NewPlan, tmp_path: Path) -> None:
    run = simulate(small(toy_plan, {"epsilon": 2.0}), tmp_path / "run", device="cpu").folder
    with closing(sqlite3.connect(run / RUN_LEDGER)) as db, db:
        db.executescript(
            "DROP TRIGGER entries_stay; UPDATE entries SET body = replace(body, '\"steps\":2', '\"steps\":1')"
            " WHERE owner = 'org-2' AND kind = 'settle'"
        )
    assert Site(run / "sites" / "org-1").ledger().spent()
    with fails_with("privacy.unusable_ledger"):
        Site(run / "sites" / "org-2").ledger().spent()


# --- without training


@pytest.fixture
def ledgers(tmp_path: Path) -> Path:
    create_run_ledger(tmp_path / RUN_LEDGER)
    return tmp_path / RUN_LEDGER


def test_ledgers_of_a_run_count_apart(ledgers: Path) -> None:
    one, other = (Ledger(ledgers, owner=name) for name in ("one", "other"))
    data = one.register_data_set(RECORDS)
    assert other.register_data_set(RECORDS) == data  # a key for all of the run
    one.settle(one.reserve("plan", 1, ROUND, data=data), 20)
    assert one.spent() == [ROUND]
    assert other.spent() == []
    grown = other.register_data_set([*RECORDS, b"x"])
    assert [found.shares for found in other.data_sets()] == [{grown: 5}, {data: 5}]
    assert [found.fingerprint for found in one.data_sets()] == [data]


def test_looking_at_a_ledger_of_a_run_enters_nothing(ledgers: Path) -> None:
    with counted_commits() as commits:
        ledger = Ledger(ledgers, owner="one")
        assert ledger.is_empty
        assert ledger.spent() == []
        ledger.reserve("plan", 1, ROUND)
    assert len(commits.files) == 1
    assert [entry.kind for entry in ledger.entries()] == ["key", "reserve"]


def test_another_key_is_refused(ledgers: Path) -> None:
    Ledger(ledgers, owner="one").register_data_set(RECORDS)
    key = ledgers.with_name("ledger.key")
    key.write_bytes(bytes(32))
    with fails_with("privacy.wrong_ledger_key"):
        Ledger(ledgers, owner="one")
    key.unlink()
    with fails_with("privacy.ledger_key_unusable"):
        Ledger(ledgers, owner="two")


def test_only_simulated_organizations_share_a_file() -> None:
    with pytest.raises(ValueError, match="not simulated"):
        SiteFile(organization="clinic", run_ledger=Path("../ledger.sqlite"))
    assert SiteFile(organization="clinic", run_ledger=Path("../ledger.sqlite"), simulated=True).run_ledger is not None
