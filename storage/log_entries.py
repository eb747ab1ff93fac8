"""The entries of a log in SQLite, each of which contains the hash of the previous one."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from cotune.storage.append_only_log import START_HASH
from cotune.storage.json_documents import parse_json


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
    """Return the SHA-256 of an entry, over the previous hash and the entry's columns, one per line.

    Args:
        previous: Hash of the previous entry.
        id: Number of the entry.
        at: When it was written.
        kind: Of the entry.
        body: As canonical JSON.
    """
    return hashlib.sha256(f"{previous}\n{id}\n{at}\n{kind}\n{body}".encode()).hexdigest()


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


class Fold(Protocol):
    """What is known of the entries so far, without keeping them."""

    def add(self, entry: Entry) -> None:
        """Take the next entry in."""


class NoFold:
    """Knows nothing."""

    def add(self, entry: Entry) -> None:
        """Leave it."""


class OpenLog:
    """The log within one transaction; what is appended is durable when the transaction ends.

    Attributes:
        db: The connection.
        count: How many entries there are.
        head: The hash of the last one.
    """

    def __init__(self, db: sqlite3.Connection, count: int = 0, head: str = START_HASH) -> None:
        self.db = db
        self.count = count
        self.head = head
        self.appended: list[Entry] = []

    @property
    def entries(self) -> list[Entry]:
        """All entries, read from the database."""
        return [Entry(id, at, kind, parse_json(body), hash) for id, at, kind, body, hash in self._rows()]

    def append(self, kind: str, body: Mapping[str, Any], at: str | None = None) -> Entry:
        """Append an entry, and return it.

        Args:
            kind: Of the entry.
            body: Plain values.
            at: When it was made; None: now.
        """
        id = self.count + 1
        at = at or datetime.now(UTC).isoformat(timespec="seconds")
        text = _canonical(body)
        entry = Entry(id, at, kind, parse_json(text), entry_hash(self.head, id, at, kind, text))
        self._insert(id, at, kind, text, entry.hash)
        self.appended.append(entry)
        self.count = id
        self.head = entry.hash
        return entry

    def _rows(self) -> sqlite3.Cursor:
        return self.db.execute("SELECT * FROM entries ORDER BY id")

    def _insert(self, id: int, at: str, kind: str, body: str, hash: str) -> None:
        self.db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (id, at, kind, body, hash))
