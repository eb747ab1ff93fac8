"""An append-only log in SQLite, chained by hashes, kept open between its transactions.

Opening it verifies the whole chain and folds every entry into what its owner needs to know (`Fold`). From then on the connection
stays open, and a transaction costs the same however long the log is: the entries that were verified are not read again, as long
as nobody else has written the files. Whether somebody has is asked before every use: SQLite's `data_version` counts commits of
other connections, and the size, the time and the identity of the files show what was done without SQLite. If so, everything is
verified again, from the first entry on.

A small file beside the database, the *anchor*, holds the number and the hash of the last entry: an older copy of the database,
restored from a backup, lacks that entry and is refused.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel

from cotune.errors import PrivacyError, RunError
from cotune.storage.append_only_log import START_HASH
from cotune.storage.files import atomic_write
from cotune.storage.json_documents import JsonDocument, parse_json
from cotune.storage.log_entries import Entry, Fold, NoFold, OpenLog, entry_hash

VERSION = 3  # of a database's schema
_ENTRIES = (
    "CREATE TABLE entries (id INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END",
    "CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END",
)


class _Anchor(BaseModel):
    """The document beside a database: how many entries there are at least, and the hash of the last of them."""

    entries: int
    hash: str


_Stamp = tuple[tuple[int, int, int] | None, ...]  # of each file: its identity, size and time of change; None: it is not there


@dataclass
class _Session:
    """An open connection with what was verified through it.

    Attributes:
        process: That opened it: a forked one must not touch it.
        version: SQLite's number of the state that was verified; commits of other connections change it.
        stamp: Of the files, after the last use.
        anchored: How many entries the anchor knows.
    """

    db: sqlite3.Connection
    process: int
    version: int = -1
    stamp: _Stamp = ()
    count: int = 0
    head: str = START_HASH
    anchored: int = 0


def _create_tables(db: sqlite3.Connection, tables: tuple[str, ...]) -> None:
    for statement in (*_ENTRIES, *tables):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {VERSION}")


@lru_cache(maxsize=4)
def _empty_database(tables: tuple[str, ...]) -> bytes:
    """A database without entries: a simulation of many organizations has one for each, and creates it once."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "empty.sqlite"
        db = sqlite3.connect(file, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        _create_tables(db, tables)
        db.close()
        return file.read_bytes()


_of_parents: list[sqlite3.Connection] = []  # in a forked process: closing them would release the locks of the parent


class DatabaseLog:
    """The log of the privacy ledger in one file.

    SQLite serializes the processes that write. A file that is damaged is never repaired, replaced or written over.

    Args:
        path: The database.
        tables: Name -> the statement that creates a further table or view of the database.
        migrations: A table of the first schema -> what appends its content, now under the given name, to the log.
        carry: Appends what the entries of the second schema say to the log.
        fold: Makes an empty fold.
        durable: Whether what is committed survives a power cut, and an older copy is refused. A killed process loses nothing in
            either case.

    Raises:
        PrivacyError: Something is wrong with the file (`privacy.unusable_ledger`).
    """

    def __init__(
        self,
        path: Path,
        tables: Mapping[str, str] | None = None,
        migrations: Mapping[str, Callable[[OpenLog, str], None]] | None = None,
        carry: Callable[[OpenLog, Sequence[Entry]], None] | None = None,
        *,
        fold: Callable[[], Fold] = NoFold,
        durable: bool = True,
    ) -> None:
        self.path = path
        self.durable = durable
        self.fold = fold()
        self._anchor = JsonDocument(path.with_name(f"{path.name}.head"), _Anchor)
        self._files = (path, path.with_name(f"{path.name}-wal"), self._anchor.file)
        self._tables = tables or {}
        self._migrations = migrations or {}
        self._carry = carry
        self._new_fold = fold
        self._session: _Session | None = None
        self._lock = threading.RLock()
        with self.transaction():
            pass

    def refresh(self) -> None:
        """Bring `fold` up to date: where nobody else has written since, that is looked at and nothing is read."""
        with self._lock:
            session = self._session
            if session is None or not self._is_untouched(session) or data_version(session.db) != session.version:
                with self.transaction():
                    pass

    def close(self) -> None:
        """Close the connection; the next use opens it again, and verifies everything."""
        with self._lock:
            session = self._session
            self._session = None
            if session is not None:
                close_connection(session.db, session.process)

    @contextmanager
    def transaction(self) -> Iterator[OpenLog]:
        """Open one write transaction: committed when the block ends, undone when it raises. Every entry is verified by then."""
        with self._lock:
            try:
                session = self._open_session()
                db = session.db
                try:
                    db.execute("BEGIN IMMEDIATE")
                    log = self._begin(session)
                    yield log
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                self._committed(session, log)
            except (sqlite3.Error, OSError) as error:
                self.close()
                raise self._unusable(str(error)) from None

    def _begin(self, session: _Session) -> OpenLog:
        """Return the log as it was verified; where the database is not what it was then, verify it."""
        version = data_version(session.db)
        if version == session.version:
            return OpenLog(session.db, session.count, session.head)
        session.version = -1  # until all of it is verified, or what is created here is committed
        self.fold = self._new_fold()
        schema = int(session.db.execute("PRAGMA user_version").fetchone()[0])
        log = self._verify(session.db, self.fold) if schema == VERSION else self._migrate(session.db, schema)
        session.anchored = self._read_anchor()[0] or 0
        if schema == VERSION:
            session.version = version
            session.count = log.count
            session.head = log.head
        return log

    def _committed(self, session: _Session, log: OpenLog) -> None:
        """Take in what was appended, and note it beside the database."""
        session.version = data_version(session.db) if session.version < 0 else session.version
        for entry in log.appended:
            self.fold.add(entry)
        session.count = log.count
        session.head = log.head
        if session.count != session.anchored and self.durable:  # an anchor may lag behind
            self._write_anchor(session.count, session.head)
            session.anchored = session.count
        session.stamp = self._stamp()

    def _open_session(self) -> _Session:
        session = self._session
        if session is not None and self._is_untouched(session):
            return session
        self.close()
        self._create()
        db = sqlite3.connect(self.path, timeout=120, isolation_level=None, check_same_thread=False)
        session = _Session(db, os.getpid())
        weakref.finalize(self, close_connection, db, session.process).atexit = False
        self._session = session
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if self.durable else 'OFF'}")  # FULL: what is committed survives a power cut
        return session

    def _is_untouched(self, session: _Session) -> bool:
        """Whether this process has opened the files and nothing has changed them without SQLite."""
        return session.process == os.getpid() and session.stamp == self._stamp()

    def _stamp(self) -> _Stamp:
        found: list[tuple[int, int, int] | None] = []
        for file in self._files:
            try:
                state = os.stat(file)
            except FileNotFoundError:
                found.append(None)
            else:
                found.append((state.st_ino, state.st_size, state.st_mtime_ns))
        return tuple(found)

    def _unusable(self, reason: str) -> PrivacyError:
        return unusable_database(self.path, reason)

    def _create(self) -> None:
        """Create an empty file that only its owner can read; the database keeps the mode."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            if self._read_anchor()[0]:
                raise self._unusable("the file is gone, but the anchor beside it says that there was one")
            if self.durable:
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            else:
                self._write_anchor(0, START_HASH)
                atomic_write(self.path, _empty_database(tuple(self._tables.values())), durable=False)

    def _migrate(self, db: sqlite3.Connection, schema: int) -> OpenLog:
        if schema > VERSION:
            raise self._unusable(f"it has the schema {schema}, this cotune knows {VERSION}: update cotune")
        if schema == VERSION - 1 and self._carry is not None:
            return self._carry_over(db, self._carry)
        return self._start_again(db)

    def _start_again(self, db: sqlite3.Connection) -> OpenLog:
        """An empty database, or one of the first schema, whose tables are kept under another name."""
        tables = {str(row[0]) for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and tables != set(self._migrations):
            raise self._unusable("it is a database of another kind")
        if self._read_anchor()[0]:
            raise self._unusable("it is empty or older than the anchor beside it says")
        self._write_anchor(0, START_HASH)  # before the first entry is committed: from then on the anchor must be there
        for table in tables:
            db.execute(f'ALTER TABLE "{table}" RENAME TO "{table}_before_{VERSION}"')
        log = self._create_tables(db)
        for table in sorted(tables):
            self._migrations[table](log, f"{table}_before_{VERSION}")
        return log

    def _create_tables(self, db: sqlite3.Connection) -> OpenLog:
        _create_tables(db, tuple(self._tables.values()))
        return OpenLog(db)

    def _carry_over(self, db: sqlite3.Connection, carry: Callable[[OpenLog, Sequence[Entry]], None]) -> OpenLog:
        """The second schema's log, verified, in a new one. What it knew records by is deleted: it was not keyed."""
        entries = self._verify(db, NoFold()).entries
        self._write_anchor(0, START_HASH)
        db.execute("PRAGMA secure_delete = ON")
        for name, statement in reversed([*self._tables.items()]):
            db.execute(f"DROP {statement.split()[1]} {name}")  # a table, or a view
        db.execute("DROP TABLE entries")
        log = self._create_tables(db)
        carry(log, entries)
        return log

    def _verify(self, db: sqlite3.Connection, fold: Fold) -> OpenLog:
        """Check that every entry has the hash that it must have, the anchored one among them, and fold them all."""
        count, anchored = self._read_anchor()
        if count is None:
            raise self._unusable(f"its anchor {self._anchor.file.name} is gone")
        log = OpenLog(db)
        at_anchor = START_HASH if count == 0 else ""
        for id, at, kind, body, hash in db.execute("SELECT * FROM entries ORDER BY id"):
            log.count += 1
            if id != log.count or hash != entry_hash(log.head, id, at, kind, body):
                raise self._unusable(f"entry {log.count} is not as it was written: somebody or something changed the file")
            log.head = hash
            at_anchor = hash if id == count else at_anchor
            fold.add(Entry(id, at, kind, parse_json(body), hash))
        if at_anchor != anchored:
            raise self._unusable(f"it holds {log.count} entries, and its anchor says {count}: an older copy was put back")
        return log

    def _read_anchor(self) -> tuple[int | None, str]:
        """How many entries the anchor knows, and the hash of the last: the database may be ahead of it, never behind."""
        try:
            found = self._anchor.read()
        except RunError:
            raise self._unusable(f"its anchor {self._anchor.file.name} is damaged") from None
        return (None, "") if found is None else (found.entries, found.hash)

    def _write_anchor(self, entries: int, hash: str) -> None:
        self._anchor.write(_Anchor(entries=entries, hash=hash), durable=self.durable)


def unusable_database(path: Path, reason: str) -> PrivacyError:
    """Return the error for a database that is not as it should be."""
    return PrivacyError(
        f"the privacy ledger {path} cannot be used ({reason}): expected the file as cotune left it, and writable;"
        " nothing is trained without it, so repair it; an older copy has not seen what was spent since",
        code="privacy.unusable_ledger",
    )


def data_version(db: sqlite3.Connection) -> int:
    """Return a number that changes when another connection has committed."""
    return int(db.execute("PRAGMA data_version").fetchone()[0])


def close_connection(db: sqlite3.Connection, process: int) -> None:
    """Close a connection that a process has opened; in a process that was forked from it, keep it for good instead."""
    if process != os.getpid():
        _of_parents.append(db)
        return
    with suppress(sqlite3.Error):
        db.close()
