"""The content of a ledger's log: its charges and data sets, which charges count where, and whether a new one may be made.

Pure functions of the entries: the same for the ledger itself and for anyone who holds an exported log.

All charges count against one total, whichever data sets they were made on. If only charges on data sets that share a record
counted, refusals and noise would reveal whether they do. An owner may keep records in *collections*, each with a total of its
own: a charge made in a collection counts there, one made in none ("") counts in all. Collections hold different records, because
a record that was charged in one is left out of all others (see `privacy.ledger.ledger`), so that a record's charges are those of
one collection and those of none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cotune.errors import PolicyError
from cotune.privacy.accounting.composition import Steps, add_counts, epsilon
from cotune.privacy.accounting.display_rounding import round_up
from cotune.privacy.accounting.filters import check_accountants, epsilon_of_total
from cotune.storage.log_entries import Entry

_COUNTED = ("reserve", "unprotected")  # kinds of entries that are in a collection


@dataclass(frozen=True)
class DataSet:
    """A data set that the ledger has seen.

    Attributes:
        fingerprint: Identifies it.
        records: How many units of privacy it has.
        first_seen: When it was entered, ISO 8601.
        shares: Fingerprints of other data sets -> how many records they have in common.
        unit: What one identity stands for, "record" or the name of a column.
    """

    fingerprint: str
    records: int
    first_seen: str
    shares: dict[str, int]
    unit: str = "record"


@dataclass(frozen=True)
class Charge:
    """One charge: the worst case while it is reserved, the steps that ran once it is settled.

    Attributes:
        id: Number of the log's entry.
        at: When, ISO 8601.
        data: The fingerprint of the data set; "" where an older cotune named none.
        plan_id: The run.
        plan: Name of the plan.
        round: Of the run.
        steps: What is charged.
        purpose: "training", or what was disclosed.
        state: Whether the charge can still be lowered.
        seconds: How long the steps took; 0 while reserved.
        collection: Where it counts; "": in all.
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
    collection: str = ""


@dataclass(frozen=True)
class History:
    """All charges that count for the records of one collection.

    Attributes:
        collection: Its name.
        runs: Run id -> its charges, in the order of the first charges.
        delta: The smallest δ at which a limit was ever checked there; 1 for none.
        total: The charges of all runs, those of equal parameters added; None: computed from the runs.
        charged: How many runs have steps; None: computed from the runs.
    """

    collection: str
    runs: Mapping[str, tuple[Steps, ...]]
    delta: float = 1.0
    total: tuple[Steps, ...] | None = None
    charged: int | None = None

    def steps_of(self, plan_id: str, more: Iterable[Steps] = ()) -> tuple[Steps, ...]:
        """Return the charges of a run, with further steps of it."""
        return (*self.runs.get(plan_id, ()), *more)

    def all_steps(self) -> tuple[Steps, ...]:
        """Return the charges of all runs, those of equal parameters added."""
        return add_counts(s for steps in self.runs.values() for s in steps) if self.total is None else self.total

    def compute_epsilon(self, limit: float, delta: float, plan_id: str = "", more: Sequence[Steps] = ()) -> float:
        """Return ε of all runs together (see `epsilon_over_runs`), with further steps of one of them.

        Args:
            limit: ε of the limit, on which the filter's order depends.
            delta: δ.
            plan_id: Of the run with further steps.
            more: The further steps.
        """
        had = any(s.count for s in self.runs.get(plan_id, ()))
        begins = not had and any(s.count for s in more)
        charged = sum(any(s.count for s in steps) for steps in self.runs.values()) if self.charged is None else self.charged
        return epsilon_of_total(charged + begins, (*self.all_steps(), *more), limit, delta)


def reserved_steps(body: Mapping[str, Any]) -> Steps:
    """Return the worst case that an entry of the kind "reserve" charges. An older cotune named no mechanism: it was Gaussian."""
    return Steps(body["noise_multiplier"], body["sample_rate"], body["count"], body.get("mechanism", "gaussian"))


def list_charges(entries: Sequence[Entry]) -> Iterator[Charge]:
    """Yield all charges, in order."""
    settled: dict[int, Mapping[str, Any]] = {}
    for e in entries:
        if e.kind == "settle":
            settled.setdefault(e.body["charge"], e.body)
    for e in entries:
        if e.kind == "reserve":
            b = e.body
            end = settled.get(e.id)
            reserved = reserved_steps(b)
            steps = replace(reserved, count=end["steps"]) if end else reserved
            state: Literal["reserved", "settled"] = "settled" if end else "reserved"
            seconds = end["seconds"] if end else 0.0
            about = (b["data"], b["plan_id"], b["plan"], b["round"], steps, b["purpose"], state, seconds)
            yield Charge(e.id, e.at, *about, collection=b.get("collection", ""))


def list_data_sets(entries: Sequence[Entry]) -> dict[str, DataSet]:
    """Return fingerprint -> data set, in the order in which they were first seen, with links in both directions."""
    found: dict[str, DataSet] = {}
    for e in entries:
        if e.kind == "data":
            new = DataSet(e.body["fingerprint"], e.body["records"], e.at, dict(e.body["shares"]), e.body.get("unit", "record"))
            for other, common in new.shares.items():
                found[other].shares[new.fingerprint] = common
            found[new.fingerprint] = new
    return found


def list_collections(entries: Sequence[Entry]) -> list[str]:
    """Return the collections in which something was charged or left without privacy, in order; [""] where all was in none."""
    named = dict.fromkeys(e.body["collection"] for e in entries if e.kind in _COUNTED and e.body.get("collection"))
    return list(named) or [""]


def list_concerned_collections(entries: Sequence[Entry], collection: str) -> list[str]:
    """Return the collections whose totals a charge concerns: its own; all, where it is made in none."""
    return [collection] if collection else list_collections(entries)


def find_charged_elsewhere(entries: Sequence[Entry], collection: str) -> set[str]:
    """Return the data sets that were charged in another collection than this one; none for the records of no collection."""
    charges = list_charges(entries) if collection else ()
    return {charge.data for charge in charges if charge.data and charge.collection not in ("", collection)}


def list_counted_charges(entries: Sequence[Entry], collection: str | None) -> Iterator[Charge]:
    """Yield the charges that count for the records of a collection: those in it, and those in none. None: all charges."""
    return (c for c in list_charges(entries) if collection is None or c.collection in ("", collection))


def build_histories(entries: Sequence[Entry], collection: str, rule: str = "", plan_id: str | None = None) -> list[History]:
    """Return what counts in each collection that a charge in `collection` concerns.

    Args:
        entries: The log.
        collection: Where the charge is made; "": in none.
        rule: Of the limit whose smallest δ is looked up.
        plan_id: Of that limit.
    """
    return [
        History(name, _runs(list_counted_charges(entries, name)), _smallest_delta(entries, name, rule, plan_id))
        for name in list_concerned_collections(entries, collection)
    ]


def _runs(charges: Iterable[Charge]) -> dict[str, tuple[Steps, ...]]:
    runs: dict[str, tuple[Steps, ...]] = {}
    for charge in charges:
        runs[charge.plan_id] = (*runs.get(charge.plan_id, ()), charge.steps)
    return runs


def _smallest_delta(entries: Sequence[Entry], collection: str, rule: str, plan_id: str | None) -> float:
    """Return the smallest δ under which something was charged to the collection: δ of a record never grows."""
    charged = (e.body for e in entries if e.kind == "reserve" and e.body.get("collection", "") in ("", collection))
    before = (limit for body in charged for limit in body.get("limits", ()))
    return min((limit["delta"] for limit in before if (limit["rule"], limit["plan_id"]) == (rule, plan_id)), default=1.0)


@dataclass(frozen=True)
class Limit:
    """A limit on the composition of a new charge with those before: at most ε at δ.

    Attributes:
        rule: Of the policy.
        epsilon: ε at most.
        delta: δ.
        plan_id: Counts the charges of that run only, composed by PLD; None: those of all runs, composed by `epsilon_over_runs`.
    """

    rule: str
    epsilon: float
    delta: float
    plan_id: str | None = None

    def compute_epsilon(self, history: History, delta: float, plan_id: str = "", more: Sequence[Steps] = ()) -> float:
        """Return ε of the charges that count for this limit, with further steps of a run.

        Args:
            history: Charges so far.
            delta: δ.
            plan_id: Of the run with further steps.
            more: The further steps.
        """
        if self.plan_id is None:
            return history.compute_epsilon(self.epsilon, delta, plan_id, more)
        return epsilon(history.steps_of(self.plan_id, more if plan_id == self.plan_id else ()), delta)


FindHistories = Callable[[str, str | None], Sequence[History]]  # (rule, run) of a limit -> see `build_histories`


def check_charge(find: FindHistories, plan_id: str, steps: Steps, limits: Sequence[Limit]) -> None:
    """Check that a charge stays within the limits in every collection that it concerns.

    Each collection counts all charges that may have touched one of its records, at the smallest δ that was ever promised there:
    the decision follows from the charges and from no record.

    Args:
        find: Returns the histories of the collections that the charge concerns.
        plan_id: The run.
        steps: The charge.
        limits: What it must stay within.

    Raises:
        PolicyError: When a limit would be exceeded.
        PrivacyError: When two accountants contradict each other about the run.
    """
    for limit in limits:
        for history in find(limit.rule, limit.plan_id):
            _check_limit(limit, history, plan_id, steps)
    if limits:
        delta = min(limit.delta for limit in limits)
        for history in find("", None):
            check_accountants(history.steps_of(plan_id, [steps]), delta)


def _check_limit(limit: Limit, history: History, plan_id: str, steps: Steps) -> None:
    delta = min(limit.delta, history.delta)
    after = limit.compute_epsilon(history, delta, plan_id, [steps])
    if after > limit.epsilon:
        left = max(0.0, limit.epsilon - limit.compute_epsilon(history, delta))
        which = f"the collection {history.collection}" if history.collection else "this organization"
        raise PolicyError(
            limit.rule,
            f"{steps.count} steps would bring {which} to ε = {round_up(after)} at δ = {delta:.2g}, expected at most"
            f" {limit.epsilon:g}, of which {left:.2f} are left: raise {limit.rule} in policy.toml, or stay out",
        )
