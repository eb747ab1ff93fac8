"""An append-only log in SQLite whose entries are chained by hashes, so that a change to what was written shows.

Every entry carries the SHA-256 over itself and the hash before it. A small file beside the database, its *anchor*, holds the
number and the hash of the last entry: an older copy of the database, put back from a backup, lacks that entry and is refused.
Anyone who can write both files can forge both; an exported head hash, kept elsewhere, shows that too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cotune.errors import PrivacyError
from cotune.storage.documents import parse_json
from cotune.storage.files import atomic_write

VERSION = 3
START = "0" * 64  # the hash before the first entry
_CHARGES = """
CREATE VIEW charges AS
SELECT r.id AS id, r.at AS at, r.body ->> '$.data' AS data, r.body ->> '$.plan_id' AS plan_id, r.body ->> '$.round' AS round,
    r.body ->> '$.purpose' AS purpose, r.body ->> '$.noise_multiplier' AS noise_multiplier,
    r.body ->> '$.sample_rate' AS sample_rate, coalesce(s.body ->> '$.steps', r.body ->> '$.count') AS steps,
    CASE WHEN s.id IS NULL THEN 'reserved' ELSE 'settled' END AS state
FROM entries r LEFT JOIN entries s ON s.kind = 'settle' AND s.body ->> '$.charge' = r.id
WHERE r.kind = 'reserve'
"""  # for anyone who looks into the file with a database browser
_SCHEMA = (
    "CREATE TABLE entries (id INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE members (fingerprint TEXT PRIMARY KEY, identities BLOB NOT NULL)",
    "CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END",
    "CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END",
    _CHARGES,
)


@dataclass(frozen=True)
class Entry:
    """One line of the log. at: UTC, ISO 8601. body: plain values. hash: over this entry and the one before."""

    id: int
    at: str
    kind: str
    body: Mapping[str, Any]
    hash: str


def entry_hash(previous: str, id: int, at: str, kind: str, body: str) -> str:
    """SHA-256 over the hash before, and the entry's own columns, one per line."""
    return hashlib.sha256(f"{previous}\n{id}\n{at}\n{kind}\n{body}".encode()).hexdigest()


class Log:
    """The entries inside one transaction; what is appended is durable when the transaction ends."""

    def __init__(self, db: sqlite3.Connection, entries: list[Entry]) -> None:
        self.db = db
        self.entries = entries

    @property
    def head(self) -> str:
        return self.entries[-1].hash if self.entries else START

    def append(self, kind: str, body: Mapping[str, Any], at: str | None = None) -> Entry:
        id = len(self.entries) + 1
        at = at or datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        entry = Entry(id, at, kind, parse_json(text), entry_hash(self.head, id, at, kind, text))
        self.db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (id, at, kind, text, entry.hash))
        self.entries.append(entry)
        return entry


class Chain:
    """The log in one file, opened for one transaction at a time; SQLite serializes the processes that write.

    Raises PrivacyError for whatever is wrong with the file: it is never repaired, replaced or written over.
    """

    def __init__(
        self,
        path: Path,
        migrations: Mapping[str, Callable[[Log, str], None]] | None = None,
        carry: Callable[[Log, Sequence[Entry]], None] | None = None,
    ) -> None:
        """migrations: a table of the first schema -> what appends its content, now under the given name, to the log.

        carry: appends what the entries of the second schema say to the log.
        """
        self.path = path
        self.anchor = path.with_name(f"{path.name}.head")
        self._migrations = migrations or {}
        self._carry = carry
        with self.transaction():
            pass

    @contextmanager
    def transaction(self) -> Iterator[Log]:
        """One write transaction: committed when the block ends, undone when it raises. Verifies the whole chain first."""
        try:
            self._create()
            with closing(sqlite3.connect(self.path, timeout=120, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")  # what is committed survives a power cut
                db.execute("BEGIN IMMEDIATE")
                try:
                    log = self._open(db)
                    before = self._anchored()[0]
                    yield log
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                if len(log.entries) != before:
                    self._write_anchor(len(log.entries), log.head)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(str(error)) from None

    def _unusable(self, reason: str) -> PrivacyError:
        return PrivacyError(
            f"the privacy ledger {self.path} cannot be used ({reason}): expected the file as cotune left it, and writable;"
            " nothing is trained without it, so mend it; an older copy has not seen what was spent since"
        )

    def _create(self) -> None:
        """An empty file that only its owner can read; the database keeps the mode."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            if self._anchored()[0]:
                raise self._unusable("the file is gone, but the anchor beside it says that there was one")
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))

    def _open(self, db: sqlite3.Connection) -> Log:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            raise self._unusable(f"it has the schema {version}, this cotune knows {VERSION}: update cotune")
        if version == VERSION:
            return Log(db, self._verified(db))
        if version == VERSION - 1 and self._carry is not None:
            return self._carried(db, self._carry)
        tables = {str(row[0]) for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and tables != set(self._migrations):
            raise self._unusable("it is a database of another kind")
        if self._anchored()[0]:
            raise self._unusable("it is empty or older than the anchor beside it says")
        self._write_anchor(0, START)  # before the first entry is committed: from then on the anchor must be there
        for table in tables:
            db.execute(f'ALTER TABLE "{table}" RENAME TO "{table}_before_{VERSION}"')
        log = self._begin(db)
        for table in sorted(tables):
            self._migrations[table](log, f"{table}_before_{VERSION}")
        return log

    def _begin(self, db: sqlite3.Connection) -> Log:
        for statement in _SCHEMA:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")
        return Log(db, [])

    def _carried(self, db: sqlite3.Connection, carry: Callable[[Log, Sequence[Entry]], None]) -> Log:
        """The second schema's log, verified, in a new one. What it knew records by is deleted: it was not keyed."""
        entries = self._verified(db)
        self._write_anchor(0, START)
        db.execute("PRAGMA secure_delete = ON")
        for statement in ("DROP VIEW charges", "DROP TABLE entries", "DROP TABLE members"):
            db.execute(statement)
        log = self._begin(db)
        carry(log, entries)
        return log

    def _verified(self, db: sqlite3.Connection) -> list[Entry]:
        """All entries, each with the hash that it must have; the anchored one among them."""
        entries: list[Entry] = []
        previous = START
        for expected, (id, at, kind, body, hash) in enumerate(db.execute("SELECT * FROM entries ORDER BY id"), start=1):
            if id != expected or hash != entry_hash(previous, id, at, kind, body):
                raise self._unusable(f"entry {expected} is not as it was written: somebody or something changed the file")
            entries.append(Entry(id, at, kind, parse_json(body), hash))
            previous = hash
        count, anchored = self._anchored()
        if count is None:
            raise self._unusable(f"its anchor {self.anchor.name} is gone")
        if count > len(entries) or (entries[count - 1].hash if count else START) != anchored:
            raise self._unusable(f"it holds {len(entries)} entries, and its anchor says {count}: an older copy was put back")
        return entries

    def _anchored(self) -> tuple[int | None, str]:
        """How many entries the anchor knows, and the hash of the last: the database may be ahead of it, never behind."""
        try:
            found = parse_json(self.anchor.read_bytes())
            return int(found["entries"]), str(found["hash"])
        except FileNotFoundError:
            return None, ""
        except (ValueError, KeyError, TypeError):
            raise self._unusable(f"its anchor {self.anchor.name} is damaged") from None

    def _write_anchor(self, entries: int, hash: str) -> None:
        atomic_write(self.anchor, json.dumps({"entries": entries, "hash": hash}).encode())
