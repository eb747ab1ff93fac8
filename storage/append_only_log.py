"""Append-only logs whose entries are chained by hashes, so that a change to what was written shows.

Each entry is bound to the hash of the one before, from `START_HASH` on: an entry that was changed, removed or inserted breaks the
chain (`verify_chain`). A log is kept in one of two ways:

- `LineLog`: a file with one JSON object per line, which people read and copy. Entries cut off at its end do not show, unless the
  last hash was noted elsewhere.
- `DatabaseLog`: SQLite, where an entry and other tables change in one transaction. A small file beside it, the *anchor*, holds
  the number and the hash of the last entry: an older copy of the database, restored from a backup, lacks that entry and is
  refused.

Anyone who can write all files of a log can forge it; an exported head hash, kept elsewhere, shows that too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from cotune.errors import PrivacyError, RunError
from cotune.storage.documents import JsonDocument, parse_json
from cotune.storage.files import exclusive_lock

START_HASH = "0" * 64  # the hash before the first entry
T = TypeVar("T")


class BrokenChain(ValueError):
    """An entry does not follow from the one before.

    Attributes:
        number: Of the first such entry, from 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"entry {number} does not follow from the one before")
        self.number = number


def verify_chain(entries: Iterable[T], follow: Callable[[str, T], str | None]) -> str:
    """Check that each entry follows from the one before, and return the hash of the last.

    Args:
        entries: In order.
        follow: (hash before, entry) -> the entry's own hash; None where it does not follow.

    Raises:
        BrokenChain: At the first entry that does not follow.
    """
    head = START_HASH
    for number, entry in enumerate(entries, start=1):
        following = follow(head, entry)
        if following is None:
            raise BrokenChain(number)
        head = following
    return head


_MAX_LINE_BYTES = 64 * 1024  # what is read to find the last line


class LineLog:
    """A log in a file of JSON lines, safe to use from several processes.

    Each line is an object with `at` (UTC, ISO 8601), what was appended, and `before`: the SHA-256 of the line before it.

    Args:
        file: The log, which is created (mode 0600) with its first entry.
        consequence: What does not happen without an entry, for the errors: "nothing is sent that is not entered there".
    """

    def __init__(self, file: Path, consequence: str) -> None:
        self.file = file
        self._consequence = consequence

    def append(self, what: str, **fields: Any) -> None:
        """Append an entry; when this returns, it survives a power cut.

        What a power cut has left of the line before stays, as a line of its own.

        Args:
            what: The kind of entry.
            fields: Plain values.

        Raises:
            RunError: The file cannot be written (`run.not_writable`), or the entry has more than 64 KiB (`run.entry_too_long`).
        """
        with exclusive_lock(self.file.with_name(f".{self.file.name}.lock")):
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                try:
                    _write_whole(descriptor, self._line(descriptor, {"what": what, **fields}))
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise RunError(
                    f"{self.file} cannot be written ({error.strerror}): {self._consequence}; make room, or mend its permissions",
                    code="run.not_writable",
                ) from None

    def _line(self, descriptor: int, entry: Mapping[str, Any]) -> bytes:
        before = _last_line(descriptor)
        unfinished = b"\n" if before and not before.endswith(b"\n") else b""
        chained = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **entry, "before": _line_hash(before)}
        line = unfinished + json.dumps(chained, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        if len(line) > _MAX_LINE_BYTES:  # the next entry would not find its beginning
            raise RunError(
                f"an entry for {self.file} has {len(line)} bytes: expected at most {_MAX_LINE_BYTES}; {self._consequence}",
                code="run.entry_too_long",
            )
        return line

    def entries(self) -> list[dict[str, Any]]:
        """Return all entries, verified; one that a power cut has torn as `{"what": "unfinished", "before": …}`.

        Raises:
            RunError: A line is not as it was written (`run.changed_log`), or the file cannot be read (`run.not_readable`).
        """
        lines = self._lines()
        try:
            verify_chain(lines, lambda before, line: _line_hash(line) if _entry(before, line).get("before") == before else None)
        except BrokenChain as broken:
            raise RunError(
                f"{self.file} is not as it was written: line {broken.number} does not follow from the line before; somebody or"
                " something changed it, so compare it with a backup",
                code="run.changed_log",
            ) from None
        return [_entry(before, line) for before, line in zip([START_HASH, *map(_line_hash, lines)], lines, strict=False)]

    @property
    def head(self) -> str:
        """The hash of the last line: who notes it elsewhere can see later that none was cut off."""
        lines = self._lines()
        return _line_hash(lines[-1] if lines else b"")

    def last(self) -> dict[str, Any]:
        """Return the last entry, unverified; empty where there is none."""
        try:
            with self.file.open("rb") as file:
                return dict(parse_json(_last_line(file.fileno())))
        except (OSError, ValueError, TypeError):
            return {}

    def newest_first(self) -> Iterator[dict[str, Any]]:
        """Iterate over the entries from the last to the first, unverified, without lines that are no entries."""
        for line in reversed(self._lines()):
            try:
                entry = parse_json(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry

    def _lines(self) -> list[bytes]:
        try:
            return self.file.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(
                f"{self.file} cannot be read ({error.strerror}): mend its permissions", code="run.not_readable"
            ) from None


def _entry(before: str, line: bytes) -> dict[str, Any]:
    """A line's entry; for one that was torn, what stands for it."""
    try:
        entry = parse_json(line)
    except ValueError:
        entry = None
    return entry if isinstance(entry, dict) else {"what": "unfinished", "before": before}


def _write_whole(descriptor: int, content: bytes) -> None:
    """Write all of it or nothing: on a full disk a part of a line is taken back."""
    size = os.fstat(descriptor).st_size
    if os.write(descriptor, content) != len(content):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def _line_hash(line: bytes) -> str:
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest() if line else START_HASH


def _last_line(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, _MAX_LINE_BYTES, max(0, size - _MAX_LINE_BYTES))
    return tail[tail.rstrip(b"\n").rfind(b"\n") + 1 :]


VERSION = 3  # of a database's schema
_ENTRIES = (
    "CREATE TABLE entries (id INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END",
    "CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END",
)


@dataclass(frozen=True)
class Entry:
    """One entry of a database.

    Attributes:
        id: Its number, from 1.
        at: When it was appended: UTC, ISO 8601.
        kind: What it is, such as "reserve".
        body: Plain values.
        hash: Over this entry and the hash before.
    """

    id: int
    at: str
    kind: str
    body: Mapping[str, Any]
    hash: str

    def follow(self, previous: str, number: int) -> str | None:
        """Return the entry's hash where it is that of the entry of this number after the hash `previous`; else None."""
        expected = entry_hash(previous, number, self.at, self.kind, _canonical(self.body))
        return self.hash if (self.id, self.hash) == (number, expected) else None


def entry_hash(previous: str, id: int, at: str, kind: str, body: str) -> str:
    """Return the SHA-256 over the hash before and the entry's own columns, one per line."""
    return hashlib.sha256(f"{previous}\n{id}\n{at}\n{kind}\n{body}".encode()).hexdigest()


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


class OpenLog:
    """The entries within one transaction; what is appended is durable when the transaction ends."""

    def __init__(self, db: sqlite3.Connection, entries: list[Entry]) -> None:
        self.db = db
        self.entries = entries

    @property
    def head(self) -> str:
        """The hash of the last entry."""
        return self.entries[-1].hash if self.entries else START_HASH

    def append(self, kind: str, body: Mapping[str, Any], at: str | None = None) -> Entry:
        """Append an entry, dated now unless `at` says otherwise, and return it."""
        id = len(self.entries) + 1
        at = at or datetime.now(UTC).isoformat(timespec="seconds")
        text = _canonical(body)
        entry = Entry(id, at, kind, parse_json(text), entry_hash(self.head, id, at, kind, text))
        self.db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (id, at, kind, text, entry.hash))
        self.entries.append(entry)
        return entry


class _Anchor(BaseModel):
    """The document beside a database: how many entries there are at least, and the hash of the last of them."""

    entries: int
    hash: str


class DatabaseLog:
    """The log of the privacy ledger in one file, opened for one transaction at a time.

    SQLite serializes the processes that write.

    A file that is damaged is never repaired, replaced or written over.

    Args:
        path: The database.
        tables: Name -> the statement that creates a further table or view of the database.
        migrations: A table of the first schema -> what appends its content, now under the given name, to the log.
        carry: Appends what the entries of the second schema say to the log.

    Raises:
        PrivacyError: Something is wrong with the file (`privacy.unusable_ledger`).
    """

    def __init__(
        self,
        path: Path,
        tables: Mapping[str, str] | None = None,
        migrations: Mapping[str, Callable[[OpenLog, str], None]] | None = None,
        carry: Callable[[OpenLog, Sequence[Entry]], None] | None = None,
    ) -> None:
        self.path = path
        self._anchor = JsonDocument(path.with_name(f"{path.name}.head"), _Anchor)
        self._tables = tables or {}
        self._migrations = migrations or {}
        self._carry = carry
        with self.transaction():
            pass

    @contextmanager
    def transaction(self) -> Iterator[OpenLog]:
        """Open one write transaction: committed when the block ends, undone when it raises. Verifies the whole chain first."""
        try:
            self._create()
            with closing(sqlite3.connect(self.path, timeout=120, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")  # what is committed survives a power cut
                db.execute("BEGIN IMMEDIATE")
                try:
                    log = self._open(db)
                    before = self._read_anchor()[0]
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
            " nothing is trained without it, so repair it; an older copy has not seen what was spent since",
            code="privacy.unusable_ledger",
        )

    def _create(self) -> None:
        """Create an empty file that only its owner can read; the database keeps the mode."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            if self._read_anchor()[0]:
                raise self._unusable("the file is gone, but the anchor beside it says that there was one")
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))

    def _open(self, db: sqlite3.Connection) -> OpenLog:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            raise self._unusable(f"it has the schema {version}, this cotune knows {VERSION}: update cotune")
        if version == VERSION:
            return OpenLog(db, self._verify(db))
        if version == VERSION - 1 and self._carry is not None:
            return self._carry_over(db, self._carry)
        return self._begin_anew(db)

    def _begin_anew(self, db: sqlite3.Connection) -> OpenLog:
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
        for statement in (*_ENTRIES, *self._tables.values()):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")
        return OpenLog(db, [])

    def _carry_over(self, db: sqlite3.Connection, carry: Callable[[OpenLog, Sequence[Entry]], None]) -> OpenLog:
        """The second schema's log, verified, in a new one. What it knew records by is deleted: it was not keyed."""
        entries = self._verify(db)
        self._write_anchor(0, START_HASH)
        db.execute("PRAGMA secure_delete = ON")
        for name, statement in reversed([*self._tables.items()]):
            db.execute(f"DROP {statement.split()[1]} {name}")  # a table, or a view
        db.execute("DROP TABLE entries")
        log = self._create_tables(db)
        carry(log, entries)
        return log

    def _verify(self, db: sqlite3.Connection) -> list[Entry]:
        """Return all entries, each with the hash that it must have; the anchored one among them."""
        rows = [tuple(row) for row in db.execute("SELECT * FROM entries ORDER BY id")]
        try:
            verify_chain(enumerate(rows, start=1), _follow_row)
        except BrokenChain as broken:
            raise self._unusable(
                f"entry {broken.number} is not as it was written: somebody or something changed the file"
            ) from None
        entries = [Entry(id, at, kind, parse_json(body), hash) for id, at, kind, body, hash in rows]
        count, anchored = self._read_anchor()
        if count is None:
            raise self._unusable(f"its anchor {self._anchor.file.name} is gone")
        if count > len(entries) or (entries[count - 1].hash if count else START_HASH) != anchored:
            raise self._unusable(f"it holds {len(entries)} entries, and its anchor says {count}: an older copy was put back")
        return entries

    def _read_anchor(self) -> tuple[int | None, str]:
        """How many entries the anchor knows, and the hash of the last: the database may be ahead of it, never behind."""
        try:
            found = self._anchor.read()
        except RunError:
            raise self._unusable(f"its anchor {self._anchor.file.name} is damaged") from None
        return (None, "") if found is None else (found.entries, found.hash)

    def _write_anchor(self, entries: int, hash: str) -> None:
        self._anchor.write(_Anchor(entries=entries, hash=hash))


def _follow_row(previous: str, numbered: tuple[int, tuple[Any, ...]]) -> str | None:
    number, (id, at, kind, body, hash) = numbered
    return str(hash) if id == number and hash == entry_hash(previous, id, at, kind, body) else None
