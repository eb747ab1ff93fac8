"""Running totals of a ledger's log, from which it decides about the next charge.

They equal what the functions of `privacy.ledger.charges` compute from the whole log, at a cost that does not grow with the log:
charges of equal parameters are added up for each run and collection. ε of a sum equals that of its charges to the last digit (see
`privacy.accounting.composition.add_counts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cotune.data.units import RECORD
from cotune.privacy.accounting.composition import Steps, add_counts
from cotune.privacy.ledger.charges import DataSet, History, reserved_steps
from cotune.storage.log_entries import Entry

ANSWER = "answer"  # name of the disclosure that a round was answered


@dataclass
class _Collection:
    """What counts for the records of one collection.

    Attributes:
        runs: Run id -> its charges, in the order of the first charges.
        total: The charges of all runs.
        charged: How many runs have steps.
        deltas: (rule, run) of a limit -> the smallest δ at which it was checked.
    """

    runs: dict[str, tuple[Steps, ...]] = field(default_factory=dict)
    total: tuple[Steps, ...] = ()
    charged: int = 0
    deltas: dict[tuple[str, str | None], float] = field(default_factory=dict)

    def copy(self) -> _Collection:
        return _Collection(dict(self.runs), self.total, self.charged, dict(self.deltas))

    def add(self, plan_id: str, steps: Steps) -> None:
        """Add steps; a negative count takes some back."""
        before = self.runs.get(plan_id, ())
        after = add_counts([*before, steps])
        self.runs[plan_id] = after
        self.total = add_counts([*self.total, steps])
        self.charged += bool(after) - bool(before)

    def note_limits(self, limits: list[Mapping[str, Any]]) -> None:
        for limit in limits:
            key = limit["rule"], limit["plan_id"]
            self.deltas[key] = min(self.deltas.get(key, 1.0), limit["delta"])


@dataclass
class _Charged:
    """A charge of one run."""

    id: int
    steps: Steps
    collection: str


@dataclass
class _Run:
    """What is known of one run."""

    charges: list[_Charged] = field(default_factory=list)
    rounds: set[int] = field(default_factory=set)
    seconds: float = 0.0
    disclosures: dict[str, list[float]] = field(default_factory=dict)  # what -> the numbers that were disclosed first
    answers: dict[int, int] = field(default_factory=dict)  # round -> the entry of its first answer


class Totals:
    """The fold of a ledger's log.

    Attributes:
        key_check: What identifies the ledger's key; None: not drawn yet.
        data_sets: Fingerprint -> data set, in the order in which they were first seen, with links in both directions.
        units: Fingerprint -> where the identities of its units are kept.
        charged_in: Collection -> the data sets that were charged in it.
        runs: Run id -> what is known of it.
    """

    def __init__(self) -> None:
        self.key_check: str | None = None
        self.data_sets: dict[str, DataSet] = {}
        self.units: dict[str, str] = {}
        self.charged_in: dict[str, dict[str, None]] = {}
        self.runs: dict[str, _Run] = {}
        self._open: dict[int, tuple[str, _Charged]] = {}
        self._of_none = _Collection()
        self._collections: dict[str, _Collection] = {}

    def add(self, entry: Entry) -> None:
        """Take the next entry in."""
        take = {
            "key": self._add_key,
            "data": self._add_data_set,
            "reserve": self._add_charge,
            "settle": self._settle,
            "unprotected": self._add_unprotected,
            "disclosure": self._add_disclosure,
            "told": self._add_disclosure,  # the name of a disclosure in ledgers of earlier versions
        }.get(entry.kind)
        if take is not None:
            take(entry)

    def _add_key(self, entry: Entry) -> None:
        if self.key_check is None:
            self.key_check = str(entry.body["check"])

    def _add_data_set(self, entry: Entry) -> None:
        body = entry.body
        name = body["fingerprint"]
        new = DataSet(name, body["records"], entry.at, dict(body["shares"]), body.get("unit", RECORD))
        for other, common in new.shares.items():
            self.data_sets[other].shares[name] = common
        self.data_sets[name] = new
        self.units.setdefault(name, str(body.get("units", name)))

    def _add_charge(self, entry: Entry) -> None:
        body = entry.body
        steps = reserved_steps(body)
        where = body.get("collection", "")
        run = self._run(body["plan_id"])
        charge = _Charged(entry.id, steps, where)
        run.charges.append(charge)
        run.rounds.add(body["round"])
        self._open[entry.id] = (body["plan_id"], charge)
        self.charged_in.setdefault(where, {})[body["data"]] = None
        for counted in self._counted_in(where):
            counted.add(body["plan_id"], steps)
            counted.note_limits(body.get("limits", []))

    def _settle(self, entry: Entry) -> None:
        """Of the first settlement of a charge; another changes nothing."""
        plan_id, charge = self._open.pop(entry.body["charge"], (None, None))
        if plan_id is None or charge is None:
            return
        self._run(plan_id).seconds += entry.body["seconds"]
        lowered = replace(charge.steps, count=entry.body["steps"] - charge.steps.count)
        charge.steps = replace(charge.steps, count=entry.body["steps"])
        if lowered.count:
            for counted in self._counted_in(charge.collection):
                counted.add(plan_id, lowered)

    def _add_unprotected(self, entry: Entry) -> None:
        self._counted_in(entry.body.get("collection", ""))

    def _add_disclosure(self, entry: Entry) -> None:
        body = entry.body
        run = self._run(body["plan_id"])
        run.disclosures.setdefault(body["what"], list(body["values"]))
        if body["what"] == ANSWER:
            run.answers.setdefault(int(body["values"][0]), entry.id)

    def _run(self, plan_id: str) -> _Run:
        return self.runs.setdefault(plan_id, _Run())

    def _counted_in(self, collection: str) -> list[_Collection]:
        """Return the collections that a charge in this one counts in; a new one begins with the charges of none."""
        if not collection:
            return [self._of_none, *self._collections.values()]
        if collection not in self._collections:
            self._collections[collection] = self._of_none.copy()
        return [self._collections[collection]]

    def open_steps(self, charge: int) -> Steps | None:
        """Return what an open charge reserves; None where it is none."""
        _, found = self._open.get(charge, (None, None))
        return None if found is None else found.steps

    def find_charged_elsewhere(self, collection: str) -> set[str]:
        """Return the data sets that were charged in another collection than this one; none for the records of no collection."""
        if not collection:
            return set()
        others = (names for where, names in self.charged_in.items() if where not in ("", collection))
        return {name for names in others for name in names if name}

    def charged_data(self) -> list[str]:
        """Return the data sets that anything was charged on; "" where an older cotune named none."""
        return list(dict.fromkeys(name for names in self.charged_in.values() for name in names))

    def histories(self, collection: str, rule: str = "", plan_id: str | None = None) -> list[History]:
        """Return the charges of each collection that a charge in the given one concerns.

        Args:
            collection: See `charges.build_histories`, as for all arguments.
            rule: Name of a limit.
            plan_id: Of the limit, if it is for one run.
        """
        if collection:
            concerned = {collection: self._collections.get(collection, self._of_none)}
        else:
            concerned = self._collections or {"": self._of_none}
        return [
            History(name, dict(each.runs), each.deltas.get((rule, plan_id), 1.0), each.total, each.charged)
            for name, each in concerned.items()
        ]

    def spent(self, plan_id: str | None, collection: str | None, before: float) -> list[Steps]:
        """Return the steps of the charges of a run (None: of all) that count in a collection (None: in any), in order.

        Args:
            before: Of entries with smaller numbers than this.
        """
        runs = self.runs.values() if plan_id is None else [self.runs[plan_id]] if plan_id in self.runs else []
        found = [c for run in runs for c in run.charges if c.id < before]
        counted = [c for c in found if not collection or c.collection in ("", collection)]
        return [c.steps for c in sorted(counted, key=lambda c: c.id)]
