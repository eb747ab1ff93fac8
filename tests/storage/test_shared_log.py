"""The logs of many owners in one database: each is verified, none is written over, and processes see each other's entries."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from cotune.storage.append_only_log import START_HASH, verify_chain
from cotune.storage.log_entries import Entry
from cotune.storage.shared_log import SharedLog, create_shared_database, open_shared_log
from tests.support.failures import fails_with
from tests.support.processes import forked

__all__ = ["forked"]  # fixtures

FORCE = "DROP TRIGGER entries_stay; DROP TRIGGER entries_remain;"


class Kinds:
    """The kinds of all entries."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def add(self, entry: Entry) -> None:
        self.kinds.append(entry.kind)


def kinds(log: SharedLog) -> list[str]:
    log.refresh()
    assert isinstance(log.fold, Kinds)
    return log.fold.kinds


def append(log: SharedLog, *names: str) -> None:
    with log.transaction() as open_log:
        for name in names:
            open_log.append(name, {})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two logs of three entries each."""
    file = tmp_path / "run" / "logs.sqlite"
    create_shared_database(file, {})
    for kind in ("a", "b", "c"):
        for owner in ("one", "other"):
            append(open_shared_log(file, owner, Kinds), kind)
    return file


def sql(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(script)


def test_logs_in_one_file_are_apart(path: Path) -> None:
    one = open_shared_log(path, "one", Kinds)
    append(one, "d")
    assert kinds(one) == ["a", "b", "c", "d"]
    assert kinds(open_shared_log(path, "other", Kinds)) == ["a", "b", "c"]
    assert open_shared_log(path, "third", Kinds).is_empty
    with one.transaction() as log:
        entries = log.entries
    verify_chain(entries, lambda before, entry: entry.follow(before, entry.id))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_transaction_that_raises_leaves_nothing(path: Path) -> None:
    one = open_shared_log(path, "one", Kinds)
    with pytest.raises(KeyError), one.transaction() as log:
        log.append("d", {})
        raise KeyError
    assert kinds(one) == ["a", "b", "c"]
    append(one, "e")
    one.close()
    assert kinds(one) == ["a", "b", "c", "e"]


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE entries SET body = '{\"steps\":1}' WHERE owner = 'one' AND id = 2",
        "UPDATE entries SET at = '2020-01-01' WHERE owner = 'one' AND id = 3",
        "UPDATE entries SET kind = 'z' WHERE owner = 'one' AND id = 1",
        "DELETE FROM entries WHERE owner = 'one' AND id = 2",
        "UPDATE entries SET id = 9 WHERE owner = 'one' AND id = 3",
        "UPDATE entries SET owner = 'one', id = 4 WHERE owner = 'other' AND id = 3",
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_a_changed_log_is_refused(path: Path, tampering: str, *, is_open: bool) -> None:
    one = open_shared_log(path, "one", Kinds)
    one.refresh()
    if not is_open:
        one.close()
    sql(path, FORCE + tampering)
    for use in (one.refresh, lambda: append(one, "d")):
        with fails_with("privacy.unusable_ledger"):
            use()


@pytest.mark.parametrize("statement", ["UPDATE entries SET body = '{}'", "DELETE FROM entries"])
def test_entries_cannot_be_changed_by_sql(path: Path, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        sql(path, statement)


def test_a_file_that_was_replaced_is_read_again(path: Path) -> None:
    one = open_shared_log(path, "one", Kinds)
    one.close()  # all of it is in one file
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    append(one, "d")
    one.close()
    os.replace(copy, path)
    assert kinds(one) == ["a", "b", "c"]


def test_a_file_that_is_gone_or_of_another_kind_is_refused(path: Path, tmp_path: Path) -> None:
    one = open_shared_log(path, "one", Kinds)
    one.close()
    path.unlink()
    with fails_with("privacy.unusable_ledger"):
        one.refresh()
    assert not path.exists()
    other = tmp_path / "other.sqlite"
    sql(other, "CREATE TABLE entries (id INTEGER)")
    with fails_with("privacy.unusable_ledger"):
        open_shared_log(other, "one", Kinds).refresh()


def test_a_database_that_is_there_is_not_created_again(path: Path) -> None:
    create_shared_database(path, {})
    assert kinds(open_shared_log(path, "one", Kinds)) == ["a", "b", "c"]


def _append_in_process(path: Path, owner: str, count: int) -> None:
    for _ in range(count):
        append(open_shared_log(path, owner, Kinds), "x")


def test_processes_append_to_one_log_in_turn(path: Path, forked: Callable[..., BaseProcess]) -> None:
    one = open_shared_log(path, "one", Kinds)
    processes = [forked(_append_in_process, path, "one", 10) for _ in range(2)]
    _append_in_process(path, "one", 10)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert kinds(one) == ["a", "b", "c", *"x" * 30]
    with one.transaction() as log:
        assert verify_chain(log.entries, lambda before, entry: entry.follow(before, entry.id)) == log.head != START_HASH
