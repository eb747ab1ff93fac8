"""The logs of many owners in one SQLite database, each chained by hashes: the ledgers of a simulated run.

A process opens the database once, whichever of its logs it needs. The log of an owner is verified when it is first used, and
again when another connection has committed to the database, or the file was replaced or written without SQLite.

What is committed survives the end of the process, but not a power failure (`synchronous = OFF`), and nothing lies beside the
database that would show an older copy: that suits accounts of nobody's records, which live as long as their run. Logs of real
records belong in a `storage.database_log.DatabaseLog`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cotune.bounded_cache import BoundedCache
from cotune.storage.append_only_log import START_HASH
from cotune.storage.database_log import close_connection, data_version, unusable_database
from cotune.storage.json_documents import parse_json
from cotune.storage.log_entries import Entry, Fold, NoFold, OpenLog, entry_hash

_VERSION = 1  # of the schema
_KIND = 0x636F7475  # SQLite's application_id: no `DatabaseLog` has one
_ENTRIES = (
    "CREATE TABLE entries (owner TEXT NOT NULL, id INTEGER NOT NULL, at TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,"
    " hash TEXT NOT NULL, PRIMARY KEY (owner, id)) WITHOUT ROWID",
    "CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END",
    "CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END",
)
_SELECT = "SELECT id, at, kind, body, hash FROM entries WHERE owner = ? ORDER BY id"


def create_shared_database(path: Path, tables: Mapping[str, str]) -> None:
    """Create an empty database that only its owner can read; one that is there is left as it is.

    Args:
        path: The database.
        tables: Name -> the statement that creates a further table or view.

    Raises:
        PrivacyError: It cannot be created (`privacy.unusable_ledger`).
    """
    if path.exists():
        return
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
        with closing(sqlite3.connect(part, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            for statement in (*_ENTRIES, *tables.values()):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_KIND}")
            db.execute(f"PRAGMA user_version = {_VERSION}")
        os.replace(part, path)
    except (sqlite3.Error, OSError) as error:
        raise unusable_database(path, str(error)) from None


class SharedLog:
    """The log of one owner in a shared database; used like a `DatabaseLog`. Made by `open_shared_log`.

    Attributes:
        fold: What is known of the entries that were verified.
        durable: False: see the module.
    """

    durable = False

    def __init__(self, database: _Database, owner: str, fold: Callable[[], Fold]) -> None:
        self._database = database
        self._owner = owner
        self._new_fold = fold
        self.fold = fold()
        self._count = 0
        self._head = START_HASH
        self._verified: _State | None = None  # of the database, when the log was verified

    @property
    def is_empty(self) -> bool:
        """Whether the log has no entry."""
        self.refresh()
        return self._count == 0

    def close(self) -> None:
        """Close the database, for all its logs; the next use opens it again, and verifies the log."""
        self._database.close()

    def refresh(self) -> None:
        """Bring `fold` up to date: where nobody else has written since, that is looked at and nothing is read."""
        with self._database.lock:
            if self._verified is None or self._verified != self._database.state_if_open():
                with self.transaction():
                    pass

    @contextmanager
    def transaction(self) -> Iterator[OpenLog]:
        """Open one write transaction, as `DatabaseLog.transaction` does; every entry of the owner is verified by then."""
        with self._database.lock:
            with self._database.transaction() as (db, state):
                if self._verified != state:
                    self._verify(db)
                    self._verified = state
                log = _OwnedLog(db, self._owner, self._count, self._head)
                yield log
            for entry in log.appended:  # they are committed
                self.fold.add(entry)
            self._count = log.count
            self._head = log.head

    def _verify(self, db: sqlite3.Connection) -> None:
        """Check that every entry has the hash that it must have, and fold them all."""
        self._verified = None
        fold = self._new_fold()
        count = 0
        head = START_HASH
        for id, at, kind, body, hash in db.execute(_SELECT, (self._owner,)):
            count += 1
            if id != count or hash != entry_hash(head, id, at, kind, body):
                raise unusable_database(
                    self._database.path,
                    f"entry {count} of {self._owner} is not as it was written: somebody or something changed the file",
                )
            head = hash
            fold.add(Entry(id, at, kind, parse_json(body), hash))
        self.fold = fold
        self._count = count
        self._head = head


class _OwnedLog(OpenLog):
    """The log of one owner within one transaction."""

    def __init__(self, db: sqlite3.Connection, owner: str, count: int, head: str) -> None:
        super().__init__(db, count, head)
        self._owner = owner

    def _rows(self) -> sqlite3.Cursor:
        return self.db.execute(_SELECT, (self._owner,))

    def _insert(self, id: int, at: str, kind: str, body: str, hash: str) -> None:
        self.db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", (self._owner, id, at, kind, body, hash))


@dataclass(frozen=True)
class _State:
    """Of a database: it is another one after it was opened again, and after another connection has committed."""

    opened: int
    version: int


class _Database:
    """The open database: one connection for all its logs in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.logs: weakref.WeakValueDictionary[str, SharedLog] = weakref.WeakValueDictionary()
        self._db: sqlite3.Connection | None = None
        self._process = 0
        self._opened = 0
        self._stamp: tuple[int, int, int] | None = None

    @contextmanager
    def transaction(self) -> Iterator[tuple[sqlite3.Connection, _State]]:
        """Open one write transaction; yield the connection and what it sees."""
        with self.lock:
            try:
                db = self._open()
                try:
                    db.execute("BEGIN IMMEDIATE")
                    yield db, _State(self._opened, data_version(db))
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                self._stamp = self._stat()
            except (sqlite3.Error, OSError) as error:
                self.close()
                raise unusable_database(self.path, str(error)) from None

    def state_if_open(self) -> _State | None:
        """Return what a transaction would see; None where it would open the database again."""
        if self._db is None or not self._is_untouched():
            return None
        return _State(self._opened, data_version(self._db))

    def close(self) -> None:
        """Close the connection."""
        with self.lock:
            if self._db is not None:
                close_connection(self._db, self._process)
            self._db = None

    def _open(self) -> sqlite3.Connection:
        if self._db is not None and self._is_untouched():
            return self._db
        self.close()
        if not self.path.exists():
            raise unusable_database(self.path, "the file is gone")
        db = sqlite3.connect(self.path, timeout=120, isolation_level=None, check_same_thread=False)
        self._db = db
        self._process = os.getpid()
        self._opened += 1
        weakref.finalize(self, close_connection, db, self._process).atexit = False
        db.execute("PRAGMA synchronous = OFF")
        kind, version = (int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("application_id", "user_version"))
        if (kind, version) != (_KIND, _VERSION):
            self.close()
            raise unusable_database(self.path, f"it is a database of another kind, or of schema {version}")
        self._stamp = self._stat()
        return db

    def _is_untouched(self) -> bool:
        """Whether this process has opened the file, and nothing has replaced it or written it without SQLite."""
        return self._process == os.getpid() and self._stamp == self._stat()

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


_databases: BoundedCache[Path, _Database] = BoundedCache(max_entries=8)  # each with up to three open files


def open_shared_log(path: Path, owner: str, fold: Callable[[], Fold] = NoFold) -> SharedLog:
    """Return the log of an owner in a database that is there; the same object as long as anybody holds it.

    Args:
        path: The database, as `create_shared_database` makes it.
        owner: Whose log.
        fold: Makes an empty fold.
    """
    database = _databases.find(path.absolute(), lambda: _Database(path))
    with database.lock:
        found = database.logs.get(owner)
        if found is None:
            found = SharedLog(database, owner, fold)
            database.logs[owner] = found
        return found
