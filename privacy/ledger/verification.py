"""Verify an exported ledger: recompute everything from its log alone, and compare.

The hash chain shows whether an entry was changed; the charges of the log are composed by the PLD accountant within a run and by
the Rényi filter over several, and each run is checked against a second accountant. All of it is compared with what the export
states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cotune.errors import DataError, PrivacyError
from cotune.privacy.accounting.composition import Steps, epsilon, epsilon_lower_bound
from cotune.privacy.accounting.filters import (
    check_accountants,
    describe_composition,
    epsilon_over_runs,
    epsilon_renyi,
    epsilon_spent,
    true_positive_rate_over_runs,
)
from cotune.privacy.claimed_guarantee import FALSE_POSITIVE_RATE, SMALL_DELTA, compute_run_figures
from cotune.privacy.ledger.charges import (
    Charge,
    DataSet,
    History,
    build_histories,
    list_collections,
    list_counted_charges,
    list_data_sets,
    reserved_steps,
)
from cotune.storage.append_only_log import BrokenChain, verify_chain
from cotune.storage.log_entries import Entry

FORMAT = "cotune ledger 3"
_EVENT = ("id", "plan_id", "mechanism", "noise_multiplier", "sample_rate", "steps")
_OF_A_RUN = ("epsilon", "epsilon_at_small_delta", "gaussian_mu", "true_positive_rate")
_TOLERANCE = 1e-3  # relative, in ε: another version of dp-accounting may round otherwise


def verify_export(export: Mapping[str, Any]) -> dict[str, Any]:
    """Recompute what an exported ledger states.

    Returns:
        Plain values: `valid`, `head`, `entries` (their number), `collections` (ε by each accountant, and as stated; none where
        the log holds charges that cannot be) and `problems`, one sentence for each disagreement.

    Raises:
        DataError: For anything but an exported ledger.
    """
    try:
        entries = [Entry(**entry) for entry in export["entries"]]
        impossible = list(_impossible(entries))
        problems = [*_chain_problems(entries, export["head"]), *impossible, *_missing(entries, export["collections"])]
        tables = [] if impossible else [_collection(entries, stated) for stated in export["collections"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"this is no exported ledger of the format {FORMAT!r} ({type(error).__name__}: {error}): expected the file that"
            " `cotune client ledger SITE --export FILE` writes",
            code="data.not_a_ledger",
        ) from None
    problems += [problem for table in tables for problem in table.pop("problems")]
    return {
        "valid": not problems,
        "head": entries[-1].hash if entries else None,
        "entries": len(entries),
        "collections": tables,
        "problems": problems,
    }


def _chain_problems(entries: Sequence[Entry], head: str | None) -> Iterator[str]:
    try:
        last = verify_chain(enumerate(entries, start=1), lambda before, numbered: numbered[1].follow(before, numbered[0]))
    except BrokenChain as broken:
        yield f"entry {broken.number} is not as it was written: its hash does not follow from it and the entry before"
        return
    if head != (last if entries else None):
        yield f"the head is stated as {str(head)[:12]}, and the log ends with {last[:12]}"


def _impossible(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield charges that no mechanism has, and reservations that are lowered twice, raised, or lowered below 0."""
    open_charges: dict[int, int] = {}
    for e in entries:
        if e.kind == "reserve":
            steps = reserved_steps(e.body)
            if not steps.is_possible:
                yield f"entry {e.id} charges {steps}, which no mechanism can be"
            open_charges[e.id] = steps.count
        elif e.kind == "settle":
            reserved = open_charges.pop(e.body["charge"], -1)
            if not 0 <= e.body["steps"] <= reserved:
                yield f"entry {e.id} lowers charge {e.body['charge']} to {e.body['steps']} steps, expected an open one of as many"


def _missing(entries: Sequence[Entry], stated: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what the log holds and no table states."""
    names = [table["collection"] for table in stated]
    if sorted(names) != sorted(list_collections(entries) if entries else []):
        yield f"the collections are stated as {names}, which are not those of the log"
    listed = {data["fingerprint"] for table in stated for data in table["data_sets"]}
    for name in list_data_sets(entries):
        if name not in listed:
            yield f"data set {name[:12]} is in the log, and the export does not list it"


def _collection(entries: Sequence[Entry], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Recompute one collection from the log. Stated values are only compared, except for the limit, and δ where no charge has
    one."""
    name = stated["collection"]
    limit = float(stated["epsilon_total"])
    history = build_histories(entries, name, "budget.epsilon_total")[0]
    delta = history.delta if history.delta < 1 else float(stated["delta"])
    total = epsilon_over_runs(history.runs, limit, delta)
    spent = epsilon_spent(history.runs, limit, delta)
    everything = [s for steps in history.runs.values() for s in steps]
    runs = [_run(run, steps, delta) for run, steps in history.runs.items()]
    problems = [
        *_not_in_the_log(entries, stated),
        *_differences(stated, {"delta": delta, "epsilon": spent, "epsilon_left": max(0.0, limit - total)}),
        *_differences(stated, _figures(history, limit, delta)),
        *_differing_runs(stated, runs),
        *_contradictions(history, delta),
    ]
    if (words := describe_composition(history.runs, limit, delta)) != stated["composition"]:
        problems.append(f'it is composed by "{stated["composition"]}", expected "{words}"')
    if total > limit * (1 + _TOLERANCE):
        problems.append(f"ε = {total:.4g} is above the limit {limit:g}")
    return {
        "collection": name,
        "delta": delta,
        "epsilon_total": limit,
        "composition": words,
        "epsilon": spent,
        "epsilon_stated": stated["epsilon"],
        "epsilon_pld": epsilon(everything, delta),
        "epsilon_renyi": epsilon_renyi(everything, delta),
        "runs": runs,
        "problems": [f"collection {name}: {problem}" if name else problem for problem in problems],
    }


def _figures(history: History, limit: float, delta: float) -> dict[str, float]:
    """Return the figures of all runs other than ε at δ."""
    return {
        "epsilon_at_small_delta": epsilon_spent(history.runs, limit, delta, at=SMALL_DELTA),
        "true_positive_rate": true_positive_rate_over_runs(history.runs, limit, delta, FALSE_POSITIVE_RATE),
    }


def _run(plan_id: str, steps: Sequence[Steps], delta: float) -> dict[str, Any]:
    return {
        "plan_id": plan_id,
        **compute_run_figures(steps, delta),
        "epsilon_at_least": epsilon_lower_bound(steps, delta),
        "epsilon_renyi": epsilon_renyi(steps, delta),
    }


def _not_in_the_log(entries: Sequence[Entry], stated: Mapping[str, Any]) -> Iterator[str]:
    """Yield data sets, records, links and events that differ from those of the log."""
    known = list_data_sets(entries)
    for data in stated["data_sets"]:
        found = known.get(data["fingerprint"], DataSet("", 0, "", {}))
        if (found.records, found.shares, found.unit) != (data["records"], data["shares_records_with"], data["unit"]):
            yield f"of data set {data['fingerprint'][:12]} the number of records, its unit or its links are not those of the log"
    charges = [_event(charge) for charge in list_counted_charges(entries, stated["collection"])]
    events = [{key: event[key] for key in _EVENT} for event in stated["events"]]
    if events != charges:
        yield f"{len(events)} events are stated, which are not the {len(charges)} charges of the log"


def _event(charge: Charge) -> dict[str, Any]:
    """Return the values of a charge that ε follows from, as an event states them."""
    steps = charge.steps
    values = (charge.id, charge.plan_id, steps.name, steps.noise_multiplier, steps.sample_rate, steps.count)
    return dict(zip(_EVENT, values, strict=True))


def _differences(stated: Mapping[str, Any], found: Mapping[str, float]) -> Iterator[str]:
    for key, value in found.items():
        if not math.isclose(float(stated[key]), value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE if key != "delta" else 0.0):
            yield f"{key} is stated as {stated[key]:.6g}, and follows as {value:.6g}"


def _differing_runs(stated: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    claims = {run["plan_id"]: run for run in stated["runs"]}
    if set(claims) != {run["plan_id"] for run in runs}:
        yield "its runs are not those of the log"
    for run in runs:
        if run["plan_id"] in claims:
            for problem in _differences(claims[run["plan_id"]], {name: run[name] for name in _OF_A_RUN}):
                yield f"run {run['plan_id'][:12]}: {problem}"


def _contradictions(history: History, delta: float) -> Iterator[str]:
    for plan_id, steps in history.runs.items():
        try:
            check_accountants(steps, delta)
        except PrivacyError as error:
            yield f"run {plan_id[:12]}: {error}"
