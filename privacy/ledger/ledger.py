"""An organization's durable account of what it spent: on its own disk, written before a record is touched.

A charge is *reserved* with the worst case before training starts, and *settled* to the steps that really ran. A crash in between
leaves the reservation standing: it counts as spent. Stored are accounting events (σ, q, steps, mechanism), never an ε, so that
composition stays tight over rounds, runs, plans, restarts and years.

All charges count against one total, or in collections (see `privacy.ledger.charges`) against one each. Which charges count is
decided by
nothing that a record could change: neither noise nor a refusal tells whether two data sets share one. A record that was charged
in a collection is left out of all others: `elsewhere` names it beforehand, and no charge is made on data that still hold it.

Records are known by HMACs under a secret of the site, in a file beside the ledger: who guesses a text cannot look it up.

What earlier schemas of a ledger hold, carried over into a new log.

Schema 1 had a table of charges without data sets. Schema 2 knew records by unkeyed hashes, which cannot be linked to keyed ones.
The charges of both count against every data set from then on: a record is never charged too little.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cotune.data.units import RECORD
from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.ledger.charges import (
    Charge,
    DataSet,
    History,
    Limit,
    charged_elsewhere,
    charges_of,
    check_charge,
    counted_for,
    data_sets_of,
    histories_of,
)
from cotune.privacy.ledger.site_key import IDENTITY, SiteKey
from cotune.storage.append_only_log import DatabaseLog, Entry, OpenLog

_CHARGES = """
CREATE VIEW charges AS
SELECT r.id AS id, r.at AS at, r.body ->> '$.data' AS data, r.body ->> '$.plan_id' AS plan_id, r.body ->> '$.round' AS round,
    r.body ->> '$.purpose' AS purpose, r.body ->> '$.noise_multiplier' AS noise_multiplier,
    r.body ->> '$.sample_rate' AS sample_rate, coalesce(s.body ->> '$.steps', r.body ->> '$.count') AS steps,
    CASE WHEN s.id IS NULL THEN 'reserved' ELSE 'settled' END AS state
FROM entries r LEFT JOIN entries s ON s.kind = 'settle' AND s.body ->> '$.charge' = r.id
WHERE r.kind = 'reserve'
"""  # for anyone who looks into the file with a database browser
_TABLES = {
    "members": "CREATE TABLE members (fingerprint TEXT PRIMARY KEY, identities BLOB NOT NULL)",
    "charges": _CHARGES,
}


def carry_table(log: OpenLog, table: str) -> None:
    """The charges of schema 1."""
    rows = log.db.execute(
        f"SELECT plan_id, round, noise_multiplier, sample_rate, steps, state, at FROM {table} ORDER BY id"
    ).fetchall()
    for plan_id, round, sigma, rate, steps, state, at in rows:
        body: dict[str, Any] = {"plan_id": plan_id, "plan": "", "round": round, "data": "", "purpose": "training"}
        entry = log.append("reserve", body | {"noise_multiplier": sigma, "sample_rate": rate, "count": steps}, at)
        if state == "settled":
            log.append("settle", {"charge": entry.id, "steps": steps, "seconds": 0.0}, at)


def carry_entries(log: OpenLog, entries: Sequence[Entry]) -> None:
    """The entries of schema 2, after one that names the end of that log. Its data sets are left behind with their hashes."""
    log.append("migrated", {"schema": 2, "entries": len(entries), "head": entries[-1].hash if entries else ""})
    now: dict[int, int] = {}
    for e in entries:
        if e.kind == "settle":
            log.append(e.kind, {**e.body, "charge": now[e.body["charge"]]}, e.at)
        elif e.kind != "data":
            now[e.id] = log.append(e.kind, {**e.body, "data": ""}, e.at).id


_ANSWER = "answer"  # that a round's update is whole, among what was told


class Ledger:
    """The account in one file. Safe to use from several processes: every transaction sees all charges before it.

    Raises PrivacyError for a ledger whose key is gone or another one: without it, known records would look new.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_file = path.with_name("ledger.key")
        self._chain = DatabaseLog(path, _TABLES, {"charges": carry_table}, carry_entries)
        self._key = self._opened_key()

    def _opened_key(self) -> SiteKey:
        """The key that the ledger was begun with; drawn when it begins."""
        with self._chain.transaction() as log:
            known = next((str(e.body["check"]) for e in log.entries if e.kind == "key"), None)
            key = SiteKey.made(self.key_file) if known is None else SiteKey.read(self.key_file)
            if known is None:
                log.append("key", {"check": key.check})
            elif known != key.check:
                raise PrivacyError(
                    f"{self.key_file} is not the key that the privacy ledger {self.path} was begun with: expected that one, as no"
                    " record can be recognized without it and nothing is trained; restore it from a backup"
                )
            return key

    def know(self, identities: Sequence[bytes], *, unit: str = "record", also: Iterable[bytes] = ()) -> str:
        """The fingerprint of a data set, which is entered with its links when it is new.

        Args:
            identities: one for each unit of privacy, unkeyed; of any length.
            unit: what an identity stands for: "record", or the name of a column.
            also: further identities by which the same people are recognized, such as those of a unit's records; they are not
                counted.
        """
        own = self._key.identities(identities)
        further = self._key.identities(also)
        blob = b"".join(sorted({*own, *further})) if further else b"".join(sorted(own))
        name = _digest(blob)
        units = b"".join(sorted(own))
        with self._chain.transaction() as log:
            if name not in data_sets_of(log.entries):
                shares = {other: common for other, common in self._common(log, blob) if common}
                for content in {blob, units}:
                    log.db.execute("INSERT OR IGNORE INTO members VALUES (?, ?)", (_digest(content), content))
                body = {"fingerprint": name, "records": len(identities), "shares": shares, "unit": unit}
                log.append("data", body | ({"units": _digest(units)} if further else {}))
        return name

    def elsewhere(self, identities: Sequence[bytes], collection: str) -> set[bytes]:
        """Those of some units' unkeyed identities that were charged in another collection than this one: to be left out here.

        Of the records of no collection ("") none is: their charges count everywhere. Units are known by themselves alone: by a
        text that many write, one person there would decide about many here.
        """
        own = np.array(self._key.identities(identities), dtype=f"S{IDENTITY}")
        found = np.zeros(len(own), dtype=bool)
        with self._chain.transaction() as log:
            for name in sorted(charged_elsewhere(log.entries, collection)):
                found |= np.isin(own, _keys(self._units(log, name)))
        return {identity for identity, there in zip(identities, found, strict=True) if there}

    def _units(self, log: OpenLog, name: str) -> bytes:
        """The keyed identities of a data set's units alone; with their records, where an older cotune has entered it."""
        bodies = (e.body for e in log.entries if e.kind == "data" and e.body["fingerprint"] == name)
        return self._members(log, next((str(body.get("units", name)) for body in bodies), name))

    def _members(self, log: OpenLog, name: str) -> bytes:
        """The keyed identities of a data set, as they were entered."""
        row = log.db.execute("SELECT identities FROM members WHERE fingerprint = ?", (name,)).fetchone()
        if row is None or _digest(row[0]) != name:
            raise PrivacyError(
                f"the privacy ledger {self.path} lacks or has changed the records of data set {name[:12]}: expected them as"
                " they were entered; nothing is trained without them, so restore the file from a backup"
            )
        return bytes(row[0])

    def _common(self, log: OpenLog, blob: bytes) -> Iterator[tuple[str, int]]:
        """Every data set of the ledger, with the number of its records that are in `blob`; one in memory at a time."""
        own = _keys(blob)
        for name in sorted(data_sets_of(log.entries)):
            yield name, len(np.intersect1d(own, _keys(self._members(log, name))))

    def _check_apart(self, log: OpenLog, data: str, collection: str) -> None:
        """Raises PrivacyError where a record of the data set was charged in another collection since it was looked up."""
        for name in sorted(charged_elsewhere(log.entries, collection)) if data else ():
            if len(np.intersect1d(_keys(self._units(log, data)), _keys(self._units(log, name)))):
                raise PrivacyError(
                    f"data set {data[:12]} holds records of another collection than {collection}, which data set {name[:12]} is"
                    " in: expected them to be left out; nothing is charged"
                )

    def reserve(
        self,
        plan_id: str,
        round: int,
        steps: Steps,
        *,
        data: str = "",
        collection: str = "",
        plan: str = "",
        purpose: str = "training",
        limits: Sequence[Limit] = (),
    ) -> int:
        """Charges the steps before they run; durable when this returns. Returns the number of the charge.

        Raises Declined, and charges nothing, when a limit would be exceeded in the collection (in none: in any); PrivacyError for
        what no mechanism can be, where two accountants contradict each other, where anything was charged before under another
        unit of privacy, and for records of another collection.
        """
        if not steps.possible:
            raise PrivacyError(f"{steps} cannot be charged: expected noise above 0, a sample rate in (0, 1] and 0 steps or more")
        with self._chain.transaction() as log:
            _check_unit(log.entries, data)
            self._check_apart(log, data, collection)
            check_charge(log.entries, collection, plan_id, steps, limits)
            body = {"plan_id": plan_id, "plan": plan, "round": round, "data": data, "purpose": purpose, **asdict(steps)}
            body |= {"collection": collection, "limits": [asdict(limit) for limit in limits]}
            return log.append("reserve", body).id

    def settle(self, charge: int, steps_run: int, seconds: float = 0.0) -> None:
        """Lowers a reservation to the steps that really ran. Raises PrivacyError for more steps than were reserved."""
        with self._chain.transaction() as log:
            found = next((c for c in charges_of(log.entries) if c.id == charge and c.state == "reserved"), None)
            if found is None or not 0 <= steps_run <= found.steps.count:
                raise PrivacyError(
                    f"charge {charge} cannot be settled to {steps_run} steps: expected an open reservation of at least as many"
                )
            log.append("settle", {"charge": charge, "steps": steps_run, "seconds": round(seconds, 3)})

    def unprotected(self, plan_id: str, round: int, what: str, *, data: str, collection: str = "", plan: str = "") -> None:
        """Enters that something about a data set is leaving without privacy; durable when this returns."""
        with self._chain.transaction() as log:
            body = {"plan_id": plan_id, "plan": plan, "round": round, "what": what, "data": data, "collection": collection}
            log.append("unprotected", body)

    def tell(self, plan_id: str, data: str, what: str, values: Sequence[float]) -> None:
        """Remembers what was told to the server once and for all, noise included."""
        with self._chain.transaction() as log:
            log.append("told", {"plan_id": plan_id, "data": data, "what": what, "values": list(values)})

    def told(self, plan_id: str, what: str) -> list[float] | None:
        """What was told before; None: nothing. Of whatever data: a new draw would show that a record came or went since."""
        for e in self.entries():
            if e.kind == "told" and (e.body["plan_id"], e.body["what"]) == (plan_id, what):
                return list(e.body["values"])
        return None

    def answer(self, plan_id: str, round: int, *, data: str) -> None:
        """Enters that a round of a run is answered; durable when this returns."""
        self.tell(plan_id, data, _ANSWER, [float(round)])

    def last_answered(self, plan_id: str) -> int:
        """The last round of a run that was answered; 0: none."""
        return max(_answers(self.entries(), plan_id), default=0)

    def charges(self) -> list[Charge]:
        """All charges, in order."""
        with self._chain.transaction() as log:
            return list(charges_of(log.entries))

    def data_sets(self) -> list[DataSet]:
        """All data sets, in the order in which they were first seen; the links in both directions."""
        with self._chain.transaction() as log:
            return list(data_sets_of(log.entries).values())

    def histories(self, collection: str = "", rule: str = "", plan_id: str | None = None) -> list[History]:
        """What counts in each collection that a charge in this one concerns; with the smallest δ of a limit."""
        with self._chain.transaction() as log:
            return histories_of(log.entries, collection, rule, plan_id)

    def entries(self) -> list[Entry]:
        """The whole log, verified."""
        with self._chain.transaction() as log:
            return list(log.entries)

    def spent(self, plan_id: str | None = None, collection: str | None = None, answered: int | None = None) -> list[Steps]:
        """The charges (of one plan; that may concern a record of the collection), reservations at their worst case.

        answered: of this round of the plan; then only what had been charged when it was, if it was.
        """
        with self._chain.transaction() as log:
            found = counted_for(log.entries, collection or None)
            end = math.inf if answered is None else _answers(log.entries, plan_id).get(answered, math.inf)
            return [c.steps for c in found if plan_id in (None, c.plan_id) and c.id < end]

    def rounds(self, plan_id: str) -> list[int]:
        """The rounds of a plan for which something was charged, in order."""
        return sorted({c.round for c in self.charges() if c.plan_id == plan_id})

    def check_unit(self, data: str) -> None:
        """Raises PrivacyError where no charge would be accepted, as something was charged under another unit."""
        with self._chain.transaction() as log:
            _check_unit(log.entries, data)


def _answers(entries: Sequence[Entry], plan_id: str | None) -> dict[int, int]:
    """Round of a run -> the number of the entry that it was first answered."""
    found: dict[int, int] = {}
    for e in entries:
        if e.kind == "told" and (e.body["plan_id"], e.body["what"]) == (plan_id, _ANSWER):
            found.setdefault(int(e.body["values"][0]), e.id)
    return found


def _digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _keys(blob: bytes) -> np.ndarray[Any, np.dtype[np.bytes_]]:
    """The identities of a blob as an array; NumPy leaves out trailing zero bytes, which keeps different ones different."""
    return np.frombuffer(blob, dtype=f"S{IDENTITY}")


def _check_unit(entries: Sequence[Entry], data: str) -> None:
    """Charges under different units of privacy do not add up: a person's records were charged as if they were strangers.

    That is so whichever records they are, and in whichever collections: an exception for data that share none would tell whether
    they do, and the texts of one person would decide which records of another collection count.
    """
    units = {name: found.unit for name, found in data_sets_of(entries).items()}
    own = units.get(data, RECORD)  # an older cotune named no data set, and knew records alone
    for charge in charges_of(entries):
        other = units.get(charge.data, RECORD)
        if other != own:
            raise PrivacyError(
                f'data set {data[:12]} protects each "{own}", and {charge.data[:12] or "one"} of the same ledger was charged for'
                f' each "{other}": expected one unit of privacy in a ledger, as charges under two do not add up; go on with'
                f' "{other}", or, for records of other people, with a site of their own'
            )
