"""What a ledger's log says: its charges and data sets, and what counts for which.

The same for the ledger itself and for whoever holds an exported log: pure functions of the entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cotune.privacy.accounting import Steps
from cotune.privacy.chain import Entry

__all__ = ["Charge", "DataSet", "History", "charges_of", "counted_for", "data_sets_of", "histories_of", "linked_to"]


@dataclass(frozen=True)
class DataSet:
    """A data set that the ledger has seen. shares: other data sets -> how many records they have in common.

    unit: what one identity stands for, "record" or the name of a column.
    """

    fingerprint: str
    records: int
    first_seen: str
    shares: dict[str, int]
    unit: str = "record"


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
class History:
    """All that counts for the records of one data set.

    data: its fingerprint. runs: id of a run -> what it was charged, in the order of the first charges. delta: the smallest δ at
    which a total was ever checked for it or for a data set that shares a record with it; 1 for none.
    """

    data: str
    runs: Mapping[str, tuple[Steps, ...]]
    delta: float = 1.0

    def with_steps(self, plan_id: str, steps: Iterable[Steps]) -> dict[str, tuple[Steps, ...]]:
        """The runs, with further steps of one of them."""
        return {**self.runs, plan_id: (*self.runs.get(plan_id, ()), *steps)}


def charges_of(entries: Sequence[Entry]) -> Iterator[Charge]:
    """All charges, in order."""
    settled = {e.body["charge"]: e.body for e in entries if e.kind == "settle"}
    for e in entries:
        if e.kind == "reserve":
            b, end = e.body, settled.get(e.id)
            count = end["steps"] if end else b["count"]
            steps = Steps(b["noise_multiplier"], b["sample_rate"], count)
            state: Literal["reserved", "settled"] = "settled" if end else "reserved"
            seconds = end["seconds"] if end else 0.0
            yield Charge(e.id, e.at, b["data"], b["plan_id"], b["plan"], b["round"], steps, b["purpose"], state, seconds)


def data_sets_of(entries: Sequence[Entry]) -> dict[str, DataSet]:
    """Fingerprint -> data set, in the order in which they were first seen; the links in both directions."""
    found: dict[str, DataSet] = {}
    for e in entries:
        if e.kind == "data":
            new = DataSet(e.body["fingerprint"], e.body["records"], e.at, dict(e.body["shares"]), e.body.get("unit", "record"))
            for other, common in new.shares.items():
                found[other].shares[new.fingerprint] = common
            found[new.fingerprint] = new
    return found


def linked_to(entries: Sequence[Entry], data: str) -> list[str]:
    """The data sets whose records a charge on `data` concerns: itself, and all that share a record with it.

    No transitive closure is needed: a record is charged only through data sets that hold it. A charge on unknown data ("")
    concerns every data set.
    """
    known = data_sets_of(entries)
    if not data:
        return ["", *known]
    return [data, *(known[data].shares if data in known else ())]


def counted_for(entries: Sequence[Entry], data: str | None) -> Iterator[Charge]:
    """The charges that count for a data set: its own, those of data sets that share a record with it, those of unknown data.

    None: all charges.
    """
    linked = {"", *linked_to(entries, data)} if data else {data}
    return (c for c in charges_of(entries) if data is None or c.data in linked)


def histories_of(entries: Sequence[Entry], data: str, rule: str = "", plan_id: str | None = None) -> list[History]:
    """What counts for each data set that a charge on `data` concerns, `data` first.

    rule, plan_id: those of the limit whose smallest δ is looked up.
    """
    return [
        History(name, _runs(counted_for(entries, name)), _smallest_delta(entries, name, rule, plan_id))
        for name in linked_to(entries, data)
    ]


def _runs(charges: Iterable[Charge]) -> dict[str, tuple[Steps, ...]]:
    runs: dict[str, tuple[Steps, ...]] = {}
    for charge in charges:
        runs[charge.plan_id] = (*runs.get(charge.plan_id, ()), charge.steps)
    return runs


def _smallest_delta(entries: Sequence[Entry], data: str, rule: str, plan_id: str | None) -> float:
    """δ of a record never grows: the smallest one under which something was charged to a data set that may hold it."""
    linked = {"", *linked_to(entries, data)}
    before = (limit for e in entries if e.kind == "reserve" and e.body["data"] in linked for limit in e.body.get("limits", ()))
    return min((limit["delta"] for limit in before if (limit["rule"], limit["plan_id"]) == (rule, plan_id)), default=1.0)
