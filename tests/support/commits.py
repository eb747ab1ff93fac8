"""Count the transactions that write to SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch


@dataclass
class Commits:
    """The databases that were written, once for each transaction that changed anything."""

    files: list[Path] = field(default_factory=list)


@contextmanager
def counted_commits() -> Iterator[Commits]:
    """Count those of connections that are opened in the block."""
    found = Commits()

    class Counted(sqlite3.Connection):
        _file = Path()
        _changes = 0

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith("BEGIN"):
                self._changes = self.total_changes
            if sql == "COMMIT" and self.total_changes > self._changes:
                found.files.append(self._file)
            return super().execute(sql, *values)

    original = sqlite3.connect

    def connect(database: Any, *given: Any, **options: Any) -> sqlite3.Connection:
        db = original(database, *given, **{**options, "factory": Counted})
        assert isinstance(db, Counted)
        db._file = Path(database)
        return db

    with patch("sqlite3.connect", connect):
        yield found
