"""An organisation's durable account of what it spent: SQLite on its own disk, written before a record is touched.

A charge is *reserved* with the worst case before training starts, and *settled* to the steps that really ran. A crash in between
leaves the reservation standing: it counts as spent. Stored are accounting events (σ, q, steps), never only an ε, so that
composition stays tight over rounds, restarts and runs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cotune.models.errors import PrivacyError
from cotune.privacy.accounting import Steps

__all__ = ["Ledger"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (
    id INTEGER PRIMARY KEY,
    plan_id TEXT NOT NULL,
    round INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
    sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
    steps INTEGER NOT NULL CHECK (steps >= 0),
    state TEXT NOT NULL CHECK (state IN ('reserved', 'settled')),
    at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
)
"""


class Ledger:
    """The charges against one data set, in one file. Safe to open from several processes: SQLite serialises the writers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as db:
            db.execute(_SCHEMA)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction: committed when the block ends. Whatever is wrong with the file is one PrivacyError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=30)) as db, db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")  # a committed charge survives a power cut
                yield db
        except (sqlite3.Error, OSError) as error:
            raise PrivacyError(
                f"the privacy ledger {self.path} cannot be used ({error}): expected a writable SQLite file; nothing is trained"
                " without it, so mend it or restore it from a backup"
            ) from None

    def reserve(self, plan_id: str, round: int, steps: Steps) -> int:
        """Charges the steps before they run; durable when this returns. Returns the number of the charge."""
        with self._open() as db:
            cursor = db.execute(
                "INSERT INTO charges (plan_id, round, noise_multiplier, sample_rate, steps, state)"
                " VALUES (?, ?, ?, ?, ?, 'reserved')",
                (plan_id, round, steps.noise_multiplier, steps.sample_rate, steps.count),
            )
            return int(cursor.lastrowid or 0)

    def settle(self, charge: int, steps_run: int) -> None:
        """Lowers a reservation to the steps that really ran. Raises PrivacyError for more steps than were reserved."""
        with self._open() as db:
            cursor = db.execute(
                "UPDATE charges SET steps = ?1, state = 'settled'"
                " WHERE id = ?2 AND state = 'reserved' AND ?1 BETWEEN 0 AND steps",
                (steps_run, charge),
            )
            if cursor.rowcount != 1:
                raise PrivacyError(
                    f"charge {charge} cannot be settled to {steps_run} steps: expected an open reservation of at least as many"
                )

    def spent(self, plan_id: str | None = None) -> list[Steps]:
        """All charges (of one plan), reservations at their worst case."""
        query = "SELECT noise_multiplier, sample_rate, steps FROM charges WHERE ? IS NULL OR plan_id = ? ORDER BY id"
        with self._open() as db:
            return [Steps(sigma, q, steps) for sigma, q, steps in db.execute(query, (plan_id, plan_id))]

    def rounds(self, plan_id: str) -> list[int]:
        """The rounds of a plan for which something was charged, in order."""
        query = "SELECT DISTINCT round FROM charges WHERE plan_id = ? ORDER BY round"
        with self._open() as db:
            return [int(row[0]) for row in db.execute(query, (plan_id,))]
