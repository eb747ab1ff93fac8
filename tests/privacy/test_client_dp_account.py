from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.client_dp_account import ClientLevelAccount
from tests.support.failures import fails_with

ROUND = Steps(2.0, 1.0, 1)


def account(folder: Path, allowed: float = 8.0) -> ClientLevelAccount:
    return ClientLevelAccount(folder / "account.jsonl", allowed, 1e-5)


def test_events_are_stored_and_epsilon_is_composed_from_them(tmp_path: Path) -> None:
    mine = account(tmp_path)
    assert mine.charges() == []
    assert mine.spent() == 0.0
    mine.charge(1, ROUND)
    mine.charge(2, ROUND)
    assert account(tmp_path).charges() == [(1, ROUND), (2, ROUND)]
    assert mine.spent() == epsilon([Steps(2.0, 1.0, 2)], 1e-5)
    lines = [json.loads(line) for line in mine.path.read_text().splitlines()]
    assert lines[0] == {"round": 1, "noise_multiplier": 2.0, "sample_rate": 1.0, "count": 1}


def test_a_repeated_round_is_charged_again(tmp_path: Path) -> None:
    mine = account(tmp_path)
    mine.charge(1, ROUND)
    before = mine.spent()
    mine.charge(1, ROUND)
    assert mine.spent() > before


def test_the_budget_is_a_hard_stop(tmp_path: Path) -> None:
    mine = account(tmp_path, allowed=epsilon([Steps(2.0, 1.0, 3)], 1e-5))
    for round in (1, 2, 3):
        assert mine.allows(ROUND)
        mine.charge(round, ROUND)
    assert not mine.allows(ROUND)
    with fails_with("privacy.client_epsilon_exceeded", "4"):
        mine.charge(4, ROUND)
    assert len(mine.charges()) == 3


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"round": 1}', '{"round": "x", "noise_multiplier": 1, "sample_rate": 1, "count": 1}']
)
def test_a_damaged_account_is_not_taken_for_an_empty_one(tmp_path: Path, content: str) -> None:
    mine = account(tmp_path)
    mine.charge(1, ROUND)
    mine.path.write_text(mine.path.read_text() + content + "\n")
    for use in (mine.charges, mine.spent, lambda: mine.charge(2, ROUND)):
        with fails_with("privacy.account_unreadable"):
            use()


def test_several_runs_share_one_account(tmp_path: Path) -> None:
    path = tmp_path / "account.jsonl"
    most = epsilon([Steps(2.0, 1.0, 3)], 1e-5)
    first = ClientLevelAccount(path, most, 1e-5, "first", total=3 * most)
    second = ClientLevelAccount(path, most, 1e-5, "second")
    for round in (1, 2, 3):
        first.charge(round, ROUND)
    assert second.charges() == []
    assert second.spent() == 0.0
    assert not second.allows(ROUND)
    with pytest.raises(PrivacyError):
        second.charge(1, ROUND)
    wider = ClientLevelAccount(path, most, 1e-5, "second", total=3 * most)
    wider.charge(1, ROUND)
    assert wider.spent() < first.spent() < wider.spent_in_all_runs()
    assert set(wider.runs()) == {"first", "second"}
    assert wider.delta_of_all_runs() == pytest.approx(1.5e-5)


def test_the_first_charge_fixes_the_limit_of_all_runs_and_delta(tmp_path: Path) -> None:
    path = tmp_path / "account.jsonl"
    ClientLevelAccount(path, 8.0, 1e-5, "first", total=20.0).charge(1, ROUND)
    before = path.read_bytes()
    assert json.loads(before.splitlines()[0]) == {"epsilon_total": 20.0, "delta": 1e-5}
    for total, delta in ((20.1, 1e-5), (20.0, 1e-6), (20.0, 2e-5)):
        later = ClientLevelAccount(path, 8.0, delta, "later", total)
        with pytest.raises(PrivacyError):
            later.check()
        with pytest.raises(PrivacyError):
            later.charge(1, ROUND)
    assert path.read_bytes() == before
    ClientLevelAccount(path, 8.0, 1e-5, "later", 19.0).charge(1, ROUND)
    same = ClientLevelAccount(path, 8.0, 1e-5, "later", 20.0)
    assert same.spent_in_all_runs() == ClientLevelAccount(path, 8.0, 1e-5, "later", 19.0).spent_in_all_runs()


def test_an_account_without_its_first_line_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "account.jsonl"
    mine = ClientLevelAccount(path, 8.0, 1e-5, "first")
    mine.charge(1, ROUND)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(PrivacyError):
        mine.check()
