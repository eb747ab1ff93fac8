"""A report on an organization's ledger, for its own people and for auditors: ε spent and left, per collection and per run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cotune.client.site_ledger import SiteWithLedger
from cotune.privacy.accounting.filters import describe_composition, epsilon_over_runs, epsilon_spent, true_positive_rate_over_runs
from cotune.privacy.claimed_guarantee import FALSE_POSITIVE_RATE, SMALL_DELTA, compute_run_figures
from cotune.privacy.config import compute_delta
from cotune.privacy.ledger.charges import (
    Charge,
    DataSet,
    build_histories,
    find_charged_elsewhere,
    list_collections,
    list_counted_charges,
    list_data_sets,
)
from cotune.privacy.ledger.verification import FORMAT
from cotune.privacy.policy import BudgetRules
from cotune.storage.log_entries import Entry


def summarize_ledger(site: SiteWithLedger) -> dict[str, Any]:
    """Return the ledger as plain values, one table per collection ("" for records without one).

    ε is recomputed from the collection's charges, at the smallest δ that was in force: `composition` is "pld" for one run, and
    "renyi filter, order α" for several, whose plans may depend on earlier answers (see `privacy.accounting.filters`). `epsilon`
    covers what was noised; `unprotected` lists what left without any privacy, for which no ε holds. A missing ledger is not
    created.

    Raises:
        PrivacyError: If the ledger is damaged.
    """
    return _books(site, events=False)[0]


def export_ledger(site: SiteWithLedger) -> dict[str, Any]:
    """Return the summary with every charge of each collection, and the log itself: everything that an auditor needs.

    An auditor needs only dp-accounting to recompute ε from the events, and only SHA-256 to verify the hashes of the log (see
    docs/ledger.md).
    """
    found, entries = _books(site, events=True)
    return {"format": FORMAT, **found, "entries": [asdict(entry) for entry in entries]}


def _books(site: SiteWithLedger, *, events: bool) -> tuple[dict[str, Any], list[Entry]]:
    entries = site.ledger().entries() if site.has_ledger else []
    known = list(list_data_sets(entries).values())
    rules = site.policy().budget
    names = list_collections(entries) if entries else []
    tables = [_collection(rules, entries, name, known, events=events) for name in names]
    return {
        "organization": site.organization,
        "head": entries[-1].hash if entries else None,
        "collections": tables,
    }, entries


def _collection(rules: BudgetRules, entries: list[Entry], name: str, known: list[DataSet], *, events: bool) -> dict[str, Any]:
    [history] = build_histories(entries, name, "budget.epsilon_total")
    counted = list(list_counted_charges(entries, name))
    elsewhere = find_charged_elsewhere(entries, name) - {charge.data for charge in counted}
    held = [data for data in known if data.fingerprint not in elsewhere]
    delta = history.delta if history.delta < 1 else _delta(rules, held)
    counted_as = epsilon_over_runs(history.runs, rules.epsilon_total, delta)
    return {
        "collection": name,
        "data_sets": [_data_set(data) for data in held],
        "delta": delta,
        "epsilon": epsilon_spent(history.runs, rules.epsilon_total, delta),
        "epsilon_at_small_delta": epsilon_spent(history.runs, rules.epsilon_total, delta, at=SMALL_DELTA),
        "true_positive_rate": true_positive_rate_over_runs(history.runs, rules.epsilon_total, delta, FALSE_POSITIVE_RATE),
        "composition": describe_composition(history.runs, rules.epsilon_total, delta),
        "epsilon_total": rules.epsilon_total,
        "epsilon_left": max(0.0, rules.epsilon_total - counted_as),
        "unprotected": [_left(e) for e in entries if e.kind == "unprotected" and e.body.get("collection", "") in ("", name)],
        "runs": [_run(plan_id, counted, delta) for plan_id in history.runs],
    } | ({"events": [_event(charge) for charge in counted]} if events else {})


def _delta(rules: BudgetRules, held: list[DataSet]) -> float:
    """Return δ of the largest data set if no charge names a δ; without a known data set, that of every statement."""
    return min((compute_delta(rules.delta_total, max(1, data.records)) for data in held), default=SMALL_DELTA)


def _data_set(data: DataSet) -> dict[str, Any]:
    return {
        "fingerprint": data.fingerprint,
        "records": data.records,
        "unit": data.unit,
        "first_seen": data.first_seen,
        "shares_records_with": data.shares,
    }


def _left(entry: Entry) -> dict[str, Any]:
    """Describe what left without any privacy, for which no ε holds."""
    return {"at": entry.at, **{key: entry.body[key] for key in ("plan_id", "plan", "round", "what")}}


def _run(plan_id: str, counted: list[Charge], delta: float) -> dict[str, Any]:
    own = [c for c in counted if c.plan_id == plan_id]
    steps = [c.steps for c in own]
    return {
        "plan_id": plan_id,
        "plan": next((c.plan for c in own if c.plan), ""),
        "rounds": len({c.round for c in own}),
        "steps": sum(c.steps.count for c in own if c.purpose == "training"),
        "interrupted": sum(c.state == "reserved" for c in own),
        "first": own[0].at,
        "last": own[-1].at,
        **compute_run_figures(steps, delta),
    }


def _event(charge: Charge) -> dict[str, Any]:
    """Return a charge as an accounting event: `steps` times a mechanism with σ, for Gaussian ones with the sample rate q."""
    table = asdict(charge)
    steps = charge.steps
    parameters = {"noise_multiplier": steps.noise_multiplier, "sample_rate": steps.sample_rate, "steps": steps.count}
    return {**table, "mechanism": steps.name, **parameters}
