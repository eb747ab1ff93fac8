"""What earlier schemas of a ledger hold, carried over into a new log.

Schema 1 had a table of charges without data sets. Schema 2 knew records by unkeyed hashes, which cannot be linked to keyed ones.
The charges of both count against every data set from then on: a record is never charged too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cotune.privacy.chain import Entry, Log


def carry_table(log: Log, table: str) -> None:
    """The charges of schema 1."""
    rows = log.db.execute(
        f"SELECT plan_id, round, noise_multiplier, sample_rate, steps, state, at FROM {table} ORDER BY id"
    ).fetchall()
    for plan_id, round, sigma, rate, steps, state, at in rows:
        body: dict[str, Any] = {"plan_id": plan_id, "plan": "", "round": round, "data": "", "purpose": "training"}
        entry = log.append("reserve", body | {"noise_multiplier": sigma, "sample_rate": rate, "count": steps}, at)
        if state == "settled":
            log.append("settle", {"charge": entry.id, "steps": steps, "seconds": 0.0}, at)


def carry_entries(log: Log, entries: Sequence[Entry]) -> None:
    """The entries of schema 2, after one that names the end of that log. Its data sets are left behind with their hashes."""
    log.append("migrated", {"schema": 2, "entries": len(entries), "head": entries[-1].hash if entries else ""})
    now: dict[int, int] = {}
    for e in entries:
        if e.kind == "settle":
            log.append(e.kind, {**e.body, "charge": now[e.body["charge"]]}, e.at)
        elif e.kind != "data":
            now[e.id] = log.append(e.kind, {**e.body, "data": ""}, e.at).id
