"""An organisation's durable account of what it spent, per data set: on its own disk, written before a record is touched.

A charge is *reserved* with the worst case before training starts, and *settled* to the steps that really ran. A crash in between
leaves the reservation standing: it counts as spent. Stored are accounting events (σ, q, steps, mechanism), never an ε, so that
composition stays tight over rounds, runs, plans, restarts and years.

A data set is known by its records, whatever their order and file. What was spent on a data set is every charge on every data set
that shares a record with it: so a grown data set goes on where the smaller one stood, and no record is charged too little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cotune.models.errors import Declined, PrivacyError
from cotune.privacy.accounting import Steps, epsilon
from cotune.privacy.chain import Chain, Entry, Log
from cotune.privacy.rounding import round_up

__all__ = ["Charge", "DataSet", "Ledger", "Limit", "fingerprint"]

_IDENTITY = 16  # bytes per record


@dataclass(frozen=True)
class DataSet:
    """A data set that the ledger has seen. shares: other data sets -> how many records they have in common."""

    fingerprint: str
    records: int
    first_seen: str
    shares: dict[str, int]


@dataclass(frozen=True)
class Charge:
    """What was spent at once: steps at their worst case while reserved, those that ran once settled.

    data: the fingerprint of the data set; "" for a charge that counts against all of them. purpose: "training", or what was told.
    """

    id: int
    at: str
    data: str
    plan_id: str
    plan: str
    round: int
    steps: Steps
    purpose: str
    state: Literal["reserved", "settled"]
    seconds: float


@dataclass(frozen=True)
class Limit:
    """Composing a new charge with those before must stay within ε at δ. plan_id: only charges of that plan; None: all."""

    rule: str
    epsilon: float
    delta: float
    plan_id: str | None = None


def fingerprint(identities: Iterable[bytes]) -> str:
    """SHA-256 over the records' identities in their own order: the same for a shuffled or newly exported file."""
    return hashlib.sha256(b"".join(sorted(identities))).hexdigest()


class Ledger:
    """The account in one file. Safe to use from several processes: every transaction sees all charges before it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chain = Chain(path, {"charges": _migrate_charges})

    def know(self, identities: Sequence[bytes]) -> str:
        """The fingerprint of a data set, which is entered with its links when it is new."""
        blob, name = b"".join(sorted(identities)), fingerprint(identities)
        with self._chain.transaction() as log:
            if name not in (e.body["fingerprint"] for e in log.entries if e.kind == "data"):
                shares = {other: common for other, common in self._common(log, blob) if common}
                log.db.execute("INSERT INTO members VALUES (?, ?)", (name, blob))
                log.append("data", {"fingerprint": name, "records": len(identities), "shares": shares})
        return name

    def _common(self, log: Log, blob: bytes) -> Iterator[tuple[str, int]]:
        """Every data set of the ledger, with the number of its records that are in `blob`; one in memory at a time."""
        own = _keys(blob)
        for name in sorted({str(e.body["fingerprint"]) for e in log.entries if e.kind == "data"}):
            row = log.db.execute("SELECT identities FROM members WHERE fingerprint = ?", (name,)).fetchone()
            if row is None or hashlib.sha256(row[0]).hexdigest() != name:
                raise PrivacyError(
                    f"the privacy ledger {self.path} lacks or has changed the records of data set {name[:12]}: expected them as"
                    " they were entered; nothing is trained without them, so restore the file from a backup"
                )
            yield name, len(np.intersect1d(own, _keys(row[0])))

    def reserve(
        self,
        plan_id: str,
        round: int,
        steps: Steps,
        *,
        data: str = "",
        plan: str = "",
        purpose: str = "training",
        limits: Sequence[Limit] = (),
    ) -> int:
        """Charges the steps before they run; durable when this returns. Returns the number of the charge.

        Raises Declined, and charges nothing, when a limit would be exceeded; PrivacyError for what no mechanism can be.
        """
        if not (steps.noise_multiplier > 0 and 0 < steps.sample_rate <= 1 and steps.count >= 0):
            raise PrivacyError(f"{steps} cannot be charged: expected noise above 0, a sample rate in (0, 1] and 0 steps or more")
        with self._chain.transaction() as log:
            _check_limits(log.entries, data, steps, limits)
            body = {"plan_id": plan_id, "plan": plan, "round": round, "data": data, "purpose": purpose, **asdict(steps)}
            return log.append("reserve", body).id

    def settle(self, charge: int, steps_run: int, seconds: float = 0.0) -> None:
        """Lowers a reservation to the steps that really ran. Raises PrivacyError for more steps than were reserved."""
        with self._chain.transaction() as log:
            found = next((c for c in _charges(log.entries) if c.id == charge and c.state == "reserved"), None)
            if found is None or not 0 <= steps_run <= found.steps.count:
                raise PrivacyError(
                    f"charge {charge} cannot be settled to {steps_run} steps: expected an open reservation of at least as many"
                )
            log.append("settle", {"charge": charge, "steps": steps_run, "seconds": round(seconds, 3)})

    def unprotected(self, plan_id: str, round: int, what: str, *, data: str, plan: str = "") -> None:
        """Enters that something about a data set is leaving without privacy; durable when this returns."""
        with self._chain.transaction() as log:
            log.append("unprotected", {"plan_id": plan_id, "plan": plan, "round": round, "what": what, "data": data})

    def tell(self, plan_id: str, data: str, what: str, values: Sequence[float]) -> None:
        """Remembers what was told to the server once and for all, noise included."""
        with self._chain.transaction() as log:
            log.append("told", {"plan_id": plan_id, "data": data, "what": what, "values": list(values)})

    def told(self, plan_id: str, data: str, what: str) -> list[float] | None:
        """What was told before; None: nothing."""
        for e in self.entries():
            if e.kind == "told" and (e.body["plan_id"], e.body["data"], e.body["what"]) == (plan_id, data, what):
                return list(e.body["values"])
        return None

    def charges(self) -> list[Charge]:
        """All charges, in order."""
        with self._chain.transaction() as log:
            return list(_charges(log.entries))

    def counted(self, data: str) -> list[Charge]:
        """The charges that count for a data set, in order."""
        with self._chain.transaction() as log:
            return list(_counted(log.entries, data))

    def data_sets(self) -> list[DataSet]:
        """All data sets, in the order in which they were first seen; the links in both directions."""
        with self._chain.transaction() as log:
            return _data_sets(log.entries)

    def entries(self) -> list[Entry]:
        """The whole log, verified."""
        with self._chain.transaction() as log:
            return list(log.entries)

    def spent(self, plan_id: str | None = None, data: str | None = None, *, other_than: str | None = None) -> list[Steps]:
        """The charges (of one plan, or of all others; that count for one data set), reservations at their worst case."""
        with self._chain.transaction() as log:
            return _spent(log.entries, plan_id, data, other_than)

    def rounds(self, plan_id: str) -> list[int]:
        """The rounds of a plan for which something was charged, in order."""
        return sorted({c.round for c in self.charges() if c.plan_id == plan_id})

    def check_unit(self, data: str, unit: str) -> None:
        """Raises PrivacyError where what was charged for a data set, or a linked one, was promised to another unit.

        Each ε is about the unit that it was promised to: the ε of a record is not that of a person, and the two do not add up.
        """
        with self._chain.transaction() as log:
            _check_unit(log.entries, data, unit)

    def promise(self, data: str, unit: str) -> None:
        """Enters to which unit of a data set everything is promised from now on; raises what `check_unit` raises."""
        with self._chain.transaction() as log:
            _check_unit(log.entries, data, unit)
            if (data, unit) not in ((e.body["data"], e.body["unit"]) for e in log.entries if e.kind == "unit"):
                log.append("unit", {"data": data, "unit": unit})


def _keys(blob: bytes) -> np.ndarray[Any, np.dtype[np.bytes_]]:
    """The identities of a blob as an array; NumPy leaves out trailing zero bytes, which keeps different ones different."""
    return np.frombuffer(blob, dtype=f"S{_IDENTITY}")


def _charges(entries: Sequence[Entry]) -> Iterator[Charge]:
    settled = {e.body["charge"]: e.body for e in entries if e.kind == "settle"}
    for e in entries:
        if e.kind == "reserve":
            b, end = e.body, settled.get(e.id)
            count = end["steps"] if end else b["count"]
            steps = Steps(b["noise_multiplier"], b["sample_rate"], count)
            state: Literal["reserved", "settled"] = "settled" if end else "reserved"
            seconds = end["seconds"] if end else 0.0
            yield Charge(e.id, e.at, b["data"], b["plan_id"], b["plan"], b["round"], steps, b["purpose"], state, seconds)


def _data_sets(entries: Sequence[Entry]) -> list[DataSet]:
    found: dict[str, DataSet] = {}
    for e in entries:
        if e.kind == "data":
            new = DataSet(e.body["fingerprint"], e.body["records"], e.at, dict(e.body["shares"]))
            for other, common in new.shares.items():
                found[other].shares[new.fingerprint] = common
            found[new.fingerprint] = new
    return list(found.values())


def _counted(entries: Sequence[Entry], data: str | None) -> Iterator[Charge]:
    """The charges that count for a data set: its own, those of data sets that share a record with it, those of unknown data."""
    linked = {d.fingerprint: {"", data, *d.shares} for d in _data_sets(entries)}.get(data or "", {"", data})
    return (c for c in _charges(entries) if data is None or c.data in linked)


def _spent(entries: Sequence[Entry], plan_id: str | None, data: str | None, other_than: str | None = None) -> list[Steps]:
    charges = (c for c in _counted(entries, data) if plan_id in (None, c.plan_id))
    return [c.steps for c in charges if c.plan_id != other_than]


def _check_unit(entries: Sequence[Entry], data: str, unit: str) -> None:
    """What was charged before units were entered was promised to records."""
    linked = {data, *next(d.shares for d in _data_sets(entries) if d.fingerprint == data)}
    promised = {e.body["data"]: e.body["unit"] for e in entries if e.kind == "unit"}
    charged = {c.data: "record" for c in _charges(entries) if c.data} | promised
    others = sorted({of for known, of in charged.items() if known in linked} - {unit})
    if others:
        raise PrivacyError(
            f"the plan promises its privacy to each {unit}, and to each {others[0]} of these data something was promised before:"
            f' expected a plan with privacy.unit = "{others[0]}", as the two cannot be added up'
        )


def _check_limits(entries: Sequence[Entry], data: str, steps: Steps, limits: Sequence[Limit]) -> None:
    for limit in limits:
        before = _spent(entries, limit.plan_id, data)
        after = epsilon([*before, steps], limit.delta)
        if after > limit.epsilon:
            left = max(0.0, limit.epsilon - epsilon(before, limit.delta))
            raise Declined(
                limit.rule,
                f"{steps.count} steps would bring this data set to ε = {round_up(after)} at δ = {limit.delta:.2g}, expected"
                f" at most {limit.epsilon:g}, of which {left:.2f} are left: raise {limit.rule} in policy.toml, or stay out",
            )


def _migrate_charges(log: Log, table: str) -> None:
    """Schema 1 had a table of charges without data sets: they count against every data set."""
    rows = log.db.execute(
        f"SELECT plan_id, round, noise_multiplier, sample_rate, steps, state, at FROM {table} ORDER BY id"
    ).fetchall()
    for plan_id, round, sigma, rate, steps, state, at in rows:
        body: dict[str, Any] = {"plan_id": plan_id, "plan": "", "round": round, "data": "", "purpose": "training"}
        entry = log.append("reserve", body | {"noise_multiplier": sigma, "sample_rate": rate, "count": steps}, at)
        if state == "settled":
            log.append("settle", {"charge": entry.id, "steps": steps, "seconds": 0.0}, at)
