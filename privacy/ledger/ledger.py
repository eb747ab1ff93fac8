"""The privacy ledger of an organization: its durable account of spent privacy, on its own disk, written before a record is read.

A charge is *reserved* for the worst case before training starts, and *settled* to the steps that really ran. After a crash in
between, the reservation remains and counts as spent. The ledger stores accounting events (σ, q, steps, mechanism), never an ε, so
that composition stays tight over rounds, runs, plans, restarts and years.

All charges count against one total, or, in collections (see `privacy.ledger.charges`), against one total each. No record can
change which charges count: neither noise nor a refusal reveals whether two data sets share a record. A record that was charged
in a collection is left out of all others: `find_charged_elsewhere` returns it beforehand, and data that still hold it cannot be
charged.

Records are identified by HMACs under a secret key of the site, in a file beside the ledger: guessing a text does not help to
look it up.

Ledgers of earlier schemas are migrated. Schema 1 had a table of charges without data sets. Schema 2 identified records by unkeyed
hashes, which cannot be linked to keyed ones. The charges of both count against every data set from then on: a record is never
charged too little.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotune.data.units import RECORD
from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.ledger.charges import (
    Charge,
    DataSet,
    History,
    Limit,
    check_charge,
    list_charges,
)
from cotune.privacy.ledger.site_key import IDENTITY_BYTES, SiteKey
from cotune.privacy.ledger.totals import ANSWER, Totals
from cotune.storage.database_log import DatabaseLog
from cotune.storage.log_entries import Entry, OpenLog
from cotune.storage.shared_log import SharedLog, create_shared_database, open_shared_log

if TYPE_CHECKING:
    import numpy as np

_CHARGES = """
CREATE VIEW charges AS
SELECT {owner}r.id AS id, r.at AS at, r.body ->> '$.data' AS data, r.body ->> '$.plan_id' AS plan_id,
    r.body ->> '$.round' AS round, r.body ->> '$.purpose' AS purpose, r.body ->> '$.noise_multiplier' AS noise_multiplier,
    r.body ->> '$.sample_rate' AS sample_rate, coalesce(s.body ->> '$.steps', r.body ->> '$.count') AS steps,
    CASE WHEN s.id IS NULL THEN 'reserved' ELSE 'settled' END AS state
FROM entries r LEFT JOIN entries s ON {same}s.kind = 'settle' AND s.body ->> '$.charge' = r.id
WHERE r.kind = 'reserve'
"""  # for anyone who looks into the file with a database browser
_TABLES = {
    "members": "CREATE TABLE members (fingerprint TEXT PRIMARY KEY, identities BLOB NOT NULL)",
    "charges": _CHARGES.format(owner="", same=""),
}
_TABLES_OF_RUN = {**_TABLES, "charges": _CHARGES.format(owner="r.owner AS owner, ", same="s.owner = r.owner AND ")}


def migrate_table(log: OpenLog, table: str) -> None:
    """Copy the charges of schema 1 into a new log."""
    rows = log.db.execute(
        f"SELECT plan_id, round, noise_multiplier, sample_rate, steps, state, at FROM {table} ORDER BY id"
    ).fetchall()
    for plan_id, round, sigma, rate, steps, state, at in rows:
        body: dict[str, Any] = {"plan_id": plan_id, "plan": "", "round": round, "data": "", "purpose": "training"}
        entry = log.append("reserve", body | {"noise_multiplier": sigma, "sample_rate": rate, "count": steps}, at)
        if state == "settled":
            log.append("settle", {"charge": entry.id, "steps": steps, "seconds": 0.0}, at)


def migrate_entries(log: OpenLog, entries: Sequence[Entry]) -> None:
    """Copy the entries of schema 2 after one that names the end of that log. Its data sets, with their hashes, are not copied."""
    log.append("migrated", {"schema": 2, "entries": len(entries), "head": entries[-1].hash if entries else ""})
    now: dict[int, int] = {}
    for e in entries:
        if e.kind == "settle":
            log.append(e.kind, {**e.body, "charge": now[e.body["charge"]]}, e.at)
        elif e.kind != "data":
            now[e.id] = log.append(e.kind, {**e.body, "data": ""}, e.at).id


def create_run_ledger(path: Path) -> None:
    """Create the database for the ledgers of all organizations of a simulated run, with its key; what is there is left as it is.

    Args:
        path: Of the file; the key lies beside it, as that of a ledger does.

    Raises:
        PrivacyError: It cannot be created (`privacy.unusable_ledger`).
    """
    create_shared_database(path, _TABLES_OF_RUN)
    SiteKey.create(_key_file(path), durable=False)


@dataclass(frozen=True)
class Settlement:
    """What became of a reservation.

    Attributes:
        charge: Its number.
        steps: That ran.
        seconds: Duration of the training.
    """

    charge: int
    steps: int
    seconds: float = 0.0


_Identities = tuple[tuple[bytes, ...], tuple[bytes, ...]]  # of the units of a data set, and further ones


class Ledger:
    """The ledger in one file. Safe to use from several processes: every transaction sees all charges before it.

    Opening it verifies the whole log. Keep it open: what a charge costs does not grow with the log then (see
    `storage.database_log`).

    Args:
        path: Of the file; its key lies beside it.
        durable: Whether what is entered survives a power cut; only the ledgers of simulated organizations can do without.
        owner: Whose ledger, where the file holds those of all organizations of a simulated run (see `create_run_ledger`), which
            are not durable; "": the file holds one.

    Raises:
        PrivacyError: When the key is missing or another one, because known records would look new; and for a damaged log.
    """

    def __init__(self, path: Path, *, durable: bool = True, owner: str = "") -> None:
        self.path = path
        self.key_file = _key_file(path)
        self._chain: DatabaseLog | SharedLog
        if owner:
            self._chain = open_shared_log(path, owner, Totals)
        else:
            self._chain = DatabaseLog(path, _TABLES, {"charges": migrate_table}, migrate_entries, fold=Totals, durable=durable)
        self._key = self._open_key()
        self._last: tuple[_Identities, str] = ((), ()), ""  # a data set, by all its identities, and its fingerprint

    @property
    def is_empty(self) -> bool:
        """Whether nothing was entered, not even the key."""
        return self._refreshed().key_check is None

    def close(self) -> None:
        """Close the file; the next use opens it again, and verifies the whole log."""
        self._chain.close()

    @property
    def _totals(self) -> Totals:
        """What is known of the log, as it was last looked at."""
        assert isinstance(self._chain.fold, Totals)
        return self._chain.fold

    def _refreshed(self) -> Totals:
        """What is known of the log as it is now."""
        self._chain.refresh()
        return self._totals

    def _open_key(self) -> SiteKey:
        """Return the key that the ledger was created with; a new ledger draws one, or enters that of its run later."""
        if self._refreshed().key_check is None and isinstance(self._chain, SharedLog):
            return SiteKey.read(self.key_file)
        if self._totals.key_check is None:
            with self._chain.transaction() as log:
                if self._totals.key_check is None:
                    log.append("key", {"check": SiteKey.create(self.key_file, durable=self._chain.durable).check})
        key = SiteKey.read(self.key_file)
        if self._totals.key_check != key.check:
            raise PrivacyError(
                f"{self.key_file} is not the key that the privacy ledger {self.path} was created with: expected that one, as"
                " no record can be recognized without it and nothing is trained; restore it from a backup",
                code="privacy.wrong_ledger_key",
            )
        return key

    def register_data_set(self, identities: Sequence[bytes], *, unit: str = "record", also: Iterable[bytes] = ()) -> str:
        """Return the fingerprint of a data set; a new data set is entered with its links to known ones.

        Args:
            identities: One for each unit of privacy, unkeyed; of any length.
            unit: What an identity stands for: "record", or the name of a column.
            also: Further identities by which the same people are recognized, such as those of a unit's records; they are not
                counted.
        """
        given = tuple(identities), tuple(also)
        known, name = self._last
        if known == given and name in self._refreshed().data_sets:
            return name
        own = self._key.identities(given[0])
        further = self._key.identities(given[1])
        blob = b"".join(sorted({*own, *further})) if further else b"".join(sorted(own))
        name = _digest(blob)
        self._last = given, name
        if name in self._refreshed().data_sets:
            return name
        units = b"".join(sorted(own))
        with self._chain.transaction() as log:
            if name not in self._totals.data_sets:
                shares = {other: common for other, common in self._common(log, blob) if common}
                for content in {blob, units}:
                    log.db.execute("INSERT OR IGNORE INTO members VALUES (?, ?)", (_digest(content), content))
                body = {"fingerprint": name, "records": len(identities), "shares": shares, "unit": unit}
                self._append(log, "data", body | ({"units": _digest(units)} if further else {}))
        return name

    def find_charged_elsewhere(self, identities: Sequence[bytes], collection: str) -> set[bytes]:
        """Return those of some units' unkeyed identities that were charged in another collection, which must be left out here.

        For records of no collection ("") there are none: their charges count everywhere. Units are identified by themselves
        alone: by a text that many people write, one person in another collection would decide about many here.
        """
        import numpy as np

        own = np.array(self._key.identities(identities), dtype=f"S{IDENTITY_BYTES}")
        found = np.zeros(len(own), dtype=bool)
        with self._chain.transaction() as log:
            for name in sorted(self._totals.find_charged_elsewhere(collection)):
                found |= np.isin(own, _as_array(self._units(log, name)))
        return {identity for identity, there in zip(identities, found, strict=True) if there}

    def _units(self, log: OpenLog, name: str) -> bytes:
        """Return the keyed identities of a data set's units; with those of their records, where an older cotune entered it."""
        return self._members(log, self._totals.units.get(name, name))

    def _members(self, log: OpenLog, name: str) -> bytes:
        """Return the keyed identities of a data set, as they were entered."""
        row = log.db.execute("SELECT identities FROM members WHERE fingerprint = ?", (name,)).fetchone()
        if row is None or _digest(row[0]) != name:
            raise PrivacyError(
                f"the privacy ledger {self.path} lacks or has changed the records of data set {name[:12]}: expected them as"
                " they were entered; nothing is trained without them, so restore the file from a backup",
                code="privacy.ledger_damaged",
            )
        return bytes(row[0])

    def _common(self, log: OpenLog, blob: bytes) -> Iterator[tuple[str, int]]:
        """Yield every data set with the number of its records that are in `blob`, holding one data set in memory at a time."""
        for name in sorted(self._totals.data_sets):
            yield name, _count_common(blob, self._members(log, name))

    def _check_no_other_collection(self, log: OpenLog, data: str, collection: str) -> None:
        """Check that no record of the data set was charged in another collection since it was looked up."""
        for name in sorted(self._totals.find_charged_elsewhere(collection)) if data else ():
            if _count_common(self._units(log, data), self._units(log, name)):
                raise PrivacyError(
                    f"data set {data[:12]} holds records of another collection than {collection}, which data set {name[:12]} is"
                    " in: expected them to be left out; nothing is charged",
                    code="privacy.mixed_collections",
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
        """Charge the steps before they run, and return the number of the charge. The charge is durable when this returns.

        Args:
            plan_id: The run.
            round: Of the run.
            steps: The worst case.
            data: Fingerprint of the data set.
            collection: Where the charge counts; "": in all collections.
            plan: Name of the plan, for people.
            purpose: "training", or what is disclosed.
            limits: What the charge, composed with those before, must stay within.

        Raises:
            PolicyError: When a limit would be exceeded in the collection (in none: in any). Nothing is charged then.
            PrivacyError: For steps that no mechanism can have, where two accountants contradict each other, where anything was
                charged before under another unit of privacy, and for records of another collection.
        """
        if not steps.is_possible:
            raise PrivacyError(
                f"{steps} cannot be charged: expected noise above 0, a sample rate in (0, 1] and 0 steps or more",
                code="privacy.impossible_charge",
            )
        with self._chain.transaction() as log:
            _check_unit(self._totals, data)
            self._check_no_other_collection(log, data, collection)
            check_charge(partial(self._totals.histories, collection), plan_id, steps, limits)
            body = {"plan_id": plan_id, "plan": plan, "round": round, "data": data, "purpose": purpose, **asdict(steps)}
            body |= {"collection": collection, "limits": [asdict(limit) for limit in limits]}
            return self._append(log, "reserve", body).id

    def settle(self, charge: int, steps_run: int, seconds: float = 0.0) -> None:
        """Lower a reservation to the steps that really ran.

        Args:
            charge: Number of the reservation.
            steps_run: Steps that ran.
            seconds: Duration of the training.

        Raises:
            PrivacyError: If the charge is not reserved, or fewer steps were reserved.
        """
        with self._chain.transaction() as log:
            self._settle(log, Settlement(charge, steps_run, seconds))

    def _settle(self, log: OpenLog, settled: Settlement) -> None:
        reserved = self._totals.open_steps(settled.charge)
        if reserved is None or not 0 <= settled.steps <= reserved.count:
            raise PrivacyError(
                f"charge {settled.charge} cannot be settled to {settled.steps} steps: expected an open reservation of at least as"
                " many",
                code="privacy.charge_not_open",
            )
        log.append("settle", {"charge": settled.charge, "steps": settled.steps, "seconds": round(settled.seconds, 3)})

    def _append(self, log: OpenLog, kind: str, body: Mapping[str, Any]) -> Entry:
        """Append an entry; to an empty log of a run, its key before."""
        if not log.count:
            log.append("key", {"check": self._key.check})
        return log.append(kind, body)

    def record_unprotected(self, plan_id: str, round: int, what: str, *, data: str, collection: str = "", plan: str = "") -> None:
        """Record durably, before it leaves, that something about a data set leaves without privacy.

        Args:
            plan_id: Of the run.
            round: In which it leaves.
            what: What leaves, in words.
            data: Fingerprint of the data set.
            collection: Of the data set; "": none.
            plan: Name of the plan.
        """
        with self._chain.transaction() as log:
            body = {"plan_id": plan_id, "plan": plan, "round": round, "what": what, "data": data, "collection": collection}
            self._append(log, "unprotected", body)

    def record_disclosure(self, plan_id: str, data: str, what: str, values: Sequence[float]) -> None:
        """Record durably the noised numbers that a run discloses, so that they are drawn only once.

        Args:
            plan_id: Of the run.
            data: Fingerprint of the data set.
            what: Name of the numbers.
            values: With their noise.
        """
        with self._chain.transaction() as log:
            self._disclose(log, plan_id, data, what, values)

    def _disclose(self, log: OpenLog, plan_id: str, data: str, what: str, values: Sequence[float]) -> None:
        self._append(log, "disclosure", {"plan_id": plan_id, "data": data, "what": what, "values": list(values)})

    def get_disclosure(self, plan_id: str, what: str) -> list[float] | None:
        """Return the numbers that were disclosed before; None: there are none.

        Of any data set of the run: a new draw would reveal that a record was added or removed since.
        """
        run = self._refreshed().runs.get(plan_id)
        found = None if run is None else run.disclosures.get(what)
        return None if found is None else list(found)

    def record_answer(self, plan_id: str, round: int, *, data: str, settled: Settlement | None = None) -> None:
        """Record durably that a round of a run was answered, and settle its charge in the same transaction.

        Args:
            plan_id: Of the run.
            round: That was answered.
            data: Fingerprint of the data set.
            settled: Of the round's charge; None: it is settled already, or stays as it was reserved.

        Raises:
            PrivacyError: As `settle` does.
        """
        with self._chain.transaction() as log:
            if settled is not None:
                self._settle(log, settled)
            self._disclose(log, plan_id, data, ANSWER, [float(round)])

    def last_answered_round(self, plan_id: str) -> int:
        """Return the last round of a run that was answered; 0: none."""
        run = self._refreshed().runs.get(plan_id)
        return 0 if run is None else max(run.answers, default=0)

    def charges(self) -> list[Charge]:
        """Return all charges, in order."""
        return list(list_charges(self.entries()))

    def data_sets(self) -> list[DataSet]:
        """Return all data sets, in the order in which they were first seen, with links in both directions."""
        return [replace(data, shares=dict(data.shares)) for data in self._refreshed().data_sets.values()]

    def histories(self, collection: str = "", rule: str = "", plan_id: str | None = None) -> list[History]:
        """Return the charges of each collection that a charge in the given one concerns.

        Args:
            collection: In which the charge would be made; "": none, which concerns all.
            rule: Name of the limit whose smallest δ is returned, too.
            plan_id: Of the limit, if it is for one run.
        """
        return self._refreshed().histories(collection, rule, plan_id)

    def entries(self) -> list[Entry]:
        """Return the whole log, verified."""
        with self._chain.transaction() as log:
            return log.entries

    def spent(self, plan_id: str | None = None, collection: str | None = None, answered: int | None = None) -> list[Steps]:
        """Return the steps of all charges, reservations at their worst case.

        Args:
            plan_id: Of this run only.
            collection: Only those that may concern a record of this collection.
            answered: Only those made before this round of the run was answered; all, where it was not answered.
        """
        totals = self._refreshed()
        run = totals.runs.get(plan_id or "")
        end = math.inf if answered is None or run is None else run.answers.get(answered, math.inf)
        return totals.spent(plan_id, collection, end)

    def rounds(self, plan_id: str) -> list[int]:
        """Return the rounds of a run for which something was charged, in order."""
        run = self._refreshed().runs.get(plan_id)
        return [] if run is None else sorted(run.rounds)

    def seconds(self, plan_id: str) -> float:
        """Return how long the steps of a run took, as far as they are settled."""
        run = self._refreshed().runs.get(plan_id)
        return 0.0 if run is None else run.seconds

    def check_unit(self, data: str) -> None:
        """Check that nothing was charged under another unit of privacy, so that a charge on the data set would be accepted.

        Raises:
            PrivacyError: Where something was.
        """
        _check_unit(self._refreshed(), data)


def _key_file(path: Path) -> Path:
    return path.with_name("ledger.key")


def _digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _count_common(blob: bytes, other: bytes) -> int:
    import numpy as np

    return len(np.intersect1d(_as_array(blob), _as_array(other)))


def _as_array(blob: bytes) -> np.ndarray[Any, np.dtype[np.bytes_]]:
    """Return the identities of a blob as an array. NumPy drops trailing zero bytes, which keeps different identities
    different."""
    import numpy as np  # late: a ledger is also opened to be looked at

    return np.frombuffer(blob, dtype=f"S{IDENTITY_BYTES}")


def _check_unit(totals: Totals, data: str) -> None:
    """Check that everything was charged under one unit of privacy: charges under different units do not add up.

    This holds for all records and collections: an exception for data sets that share no record would reveal whether they do, and
    the texts of one person would decide which records of another collection count.

    Raises:
        PrivacyError: Where they were not.
    """
    units = {name: found.unit for name, found in totals.data_sets.items()}
    own = units.get(data, RECORD)  # an older cotune named no data set, and knew records alone
    for charged in totals.charged_data():
        other = units.get(charged, RECORD)
        if other != own:
            raise PrivacyError(
                f'data set {data[:12]} protects each "{own}", and {charged[:12] or "one"} of the same ledger was charged for'
                f' each "{other}": expected one unit of privacy in a ledger, as charges under two do not add up; go on with'
                f' "{other}", or, for records of other people, with a site of their own',
                code="privacy.mixed_units",
            )
