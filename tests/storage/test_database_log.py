"""The log behind the ledger: what was written shows when it is changed, and nothing damaged is ever written over."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.ledger.ledger import Ledger
from cotune.storage.database_log import DatabaseLog
from cotune.storage.log_entries import Entry, entry_hash
from tests.support.failures import fails_with

ROUND = Steps(1.0, 0.05, 20)
FORCE = "DROP TRIGGER entries_stay; DROP TRIGGER entries_remain;"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with its key, and three rounds of one data set."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    data = ledger.register_data_set([bytes([i]) * 16 for i in range(5)])
    for round in (1, 2, 3):
        ledger.settle(ledger.reserve("plan", round, ROUND, data=data), 20)
    return ledger.path


def sql(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(script)


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE entries SET body = replace(body, '\"noise_multiplier\":1.0', '\"noise_multiplier\":9.0') WHERE id = 3",
        "UPDATE entries SET body = replace(body, '20', '02') WHERE kind = 'settle'",
        "UPDATE entries SET at = '2020-01-01' WHERE id = 2",
        "UPDATE entries SET kind = 'note' WHERE id = 4",
        "DELETE FROM entries WHERE id = 3",
        "DELETE FROM entries WHERE id > 6",  # the last ones: the chain alone would not show it
        "DELETE FROM entries",
        "UPDATE entries SET id = 99 WHERE id = 7",
    ],
)
def test_a_changed_log_is_refused_and_left_as_it_is(path: Path, tampering: str) -> None:
    sql(path, FORCE + tampering)
    changed = path.read_bytes()
    for use in (lambda: Ledger(path), lambda: Ledger(path).spent()):
        with fails_with("privacy.unusable_ledger"):
            use()
    assert path.read_bytes() == changed


@pytest.mark.parametrize("statement", ["UPDATE entries SET body = '{}' WHERE id = 2", "DELETE FROM entries WHERE id = 2"])
def test_entries_cannot_be_changed_by_accident(path: Path, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="entries are never"):
        sql(path, statement)
    assert len(Ledger(path).spent()) == 3


def test_an_older_copy_put_back_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    old = path.with_name("backup")
    shutil.copy(path, old)
    Ledger(path).reserve("plan", 4, ROUND)
    for side in ("-wal", "-shm"):
        path.with_name(path.name + side).unlink(missing_ok=True)
    shutil.copy(old, path)
    with fails_with("privacy.unusable_ledger", "8", "9"):
        Ledger(path)


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def without_anchor(path: Path) -> None:
    path.with_name("ledger.sqlite.head").unlink()


def broken_anchor(path: Path) -> None:
    path.with_name("ledger.sqlite.head").write_text("{")


def newer(path: Path) -> None:
    sql(path, "PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (removed, "the file is gone"),
        (emptied, "empty or older"),
        (without_anchor, "its anchor .* is gone"),
        (broken_anchor, "its anchor .* is damaged"),
        (newer, "update cotune"),
    ],
)
def test_what_is_missing_is_not_recreated(path: Path, damage: Callable[[Path], None], said: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for side in ("-wal", "-shm"):
        path.with_name(path.name + side).unlink(missing_ok=True)
    damage(path)
    with pytest.raises(PrivacyError, match=said):
        Ledger(path)


def test_a_crash_between_commit_and_anchor_is_no_tampering(path: Path) -> None:
    anchor = path.with_name("ledger.sqlite.head")
    before = anchor.read_bytes()
    Ledger(path).reserve("plan", 4, ROUND)
    anchor.write_bytes(before)
    assert len(Ledger(path).spent()) == 4
    Ledger(path).reserve("plan", 5, ROUND)
    assert json.loads(anchor.read_bytes())["entries"] == 10


def test_an_aborted_transaction_leaves_nothing(path: Path) -> None:
    chain = DatabaseLog(path)

    def aborted() -> None:
        with chain.transaction() as log:
            log.append("reserve", {"never": True})
            raise RuntimeError("the process has a problem")

    with pytest.raises(RuntimeError):
        aborted()
    assert len(Ledger(path).spent()) == 3


def test_only_the_owner_can_read_it(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_an_entry_shows(path: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    copy = tmp_path_factory.mktemp("copy") / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for name in ("ledger.sqlite", "ledger.sqlite.head"):
        shutil.copy(path.with_name(name), copy.with_name(name))
    with closing(sqlite3.connect(copy)) as db, db:
        db.executescript(FORCE)
        id = data.draw(st.integers(1, 8))
        column = data.draw(st.sampled_from(["at", "kind", "body", "hash"]))
        [text] = db.execute(f"SELECT {column} FROM entries WHERE id = ?", (id,)).fetchone()
        at = data.draw(st.integers(0, len(text) - 1))
        letter = data.draw(st.characters(codec="ascii", exclude_characters=text[at]))
        db.execute(f"UPDATE entries SET {column} = ? WHERE id = ?", (text[:at] + letter + text[at + 1 :], id))
    with pytest.raises(PrivacyError):
        Ledger(copy)


def test_the_hash_is_what_the_documents_say() -> None:
    """By hand: printf '%s\\n1\\nnow\\nkind\\n{}' (64 zeros) | sha256sum."""
    import hashlib

    assert entry_hash("0" * 64, 1, "now", "kind", "{}") == hashlib.sha256(b"0" * 64 + b"\n1\nnow\nkind\n{}").hexdigest()


class Counting:
    """A fold that counts what it was given."""

    def __init__(self) -> None:
        self.entries = 0

    def add(self, entry: Entry) -> None:
        self.entries += 1


def test_open_log_reads_entries_once_and_verifies_others_writes(tmp_path: Path) -> None:
    made: list[Counting] = []

    def fold() -> Counting:
        made.append(Counting())
        return made[-1]

    log = DatabaseLog(tmp_path / "log.sqlite", fold=fold)
    for number in range(5):
        with log.transaction() as open_log:
            open_log.append("note", {"number": number})
    log.refresh()
    opened = len(made)
    assert made[-1].entries == 5
    with DatabaseLog(log.path).transaction() as other:
        other.append("note", {"number": 5})
    log.refresh()
    assert (len(made), made[-1].entries) == (opened + 1, 6)


@pytest.mark.parametrize("use", [Ledger.spent, Ledger.entries, lambda kept: kept.reserve("plan", 4, ROUND)])
def test_change_under_an_open_ledger_shows_at_its_next_use(path: Path, use: Callable[[Ledger], object]) -> None:
    kept = Ledger(path)
    assert len(kept.spent()) == 3
    sql(path, FORCE + "UPDATE entries SET at = '2020-01-01' WHERE id = 2")
    with fails_with("privacy.unusable_ledger", "2"):
        use(kept)
    with fails_with("privacy.unusable_ledger", "2"):  # and again
        use(kept)


def test_older_copy_under_an_open_ledger_is_refused(path: Path) -> None:
    old = path.with_name("backup")
    shutil.copy(path, old)
    kept = Ledger(path)
    kept.reserve("plan", 4, ROUND)
    old.replace(path)
    for side in ("-wal", "-shm"):
        path.with_name(path.name + side).unlink(missing_ok=True)
    with fails_with("privacy.unusable_ledger", "8", "9"):
        kept.spent()


def test_a_transaction_that_fails_leaves_a_kept_log_as_it_was(path: Path) -> None:
    kept = Ledger(path)

    def aborted() -> None:
        with kept._chain.transaction() as log:
            log.append("reserve", {"never": True})
            raise RuntimeError("the process has a problem")

    with pytest.raises(RuntimeError):
        aborted()
    kept.reserve("plan", 4, ROUND)
    assert len(kept.spent()) == len(Ledger(path).spent()) == 4


def test_a_forked_process_opens_the_log_itself(path: Path) -> None:
    kept = Ledger(path)
    kept.reserve("plan", 4, ROUND)
    child = os.fork()
    if child == 0:
        os._exit(0 if kept.reserve("plan", 5, ROUND) else 1)
    assert os.waitpid(child, 0)[1] == 0
    kept.reserve("plan", 6, ROUND)
    assert len(kept.spent()) == len(Ledger(path).spent()) == 6
