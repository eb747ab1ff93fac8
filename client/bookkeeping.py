"""What an organization's ledger says, for its own people and for auditors: per data set, per run, ε and what is left."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cotune.client.site import Site
from cotune.privacy.accounting import Steps, delta_of, epsilon, gaussian_mu, true_positive_rate
from cotune.privacy.chain import Entry
from cotune.privacy.filters import composition, epsilon_over_runs, epsilon_spent
from cotune.privacy.ledger import Charge, DataSet, Ledger
from cotune.privacy.verification import FORMAT

__all__ = ["export", "overview"]


def overview(site: Site) -> dict[str, Any]:
    """The ledger as plain values; ε is composed anew from the charges, at the smallest δ that was in force for each data set.

    composition says how: "pld" for one run, "renyi filter, order α" over several, whose plans may have been chosen after seeing
    answers (see `privacy.filters`). epsilon is that of what was noised; `unprotected` lists what left beside it without any
    privacy, which no ε bounds. Raises PrivacyError for a ledger that is damaged, and makes none where there is none.
    """
    if not site.ledger_file.exists():
        return {"organisation": site.organisation, "head": None, "data_sets": [], "unassigned": []}
    ledger = site.ledger()
    charges, entries = ledger.charges(), ledger.entries()
    return {
        "organisation": site.organisation,
        "head": entries[-1].hash if entries else None,
        "data_sets": [_data_set(site, ledger, data) for data in ledger.data_sets()],
        "unassigned": [_event(charge) for charge in charges if not charge.data],
    }


def export(site: Site) -> dict[str, Any]:
    """The overview with every event that counts for each data set, and the log itself: all that an auditor needs.

    ε follows from the events with dp-accounting alone, and the hashes of the log from SHA-256 alone (see docs/ledger.md).
    """
    found: dict[str, Any] = overview(site) | {"entries": []}
    if site.ledger_file.exists():
        ledger = site.ledger()
        for table in found["data_sets"]:
            table["events"] = [_event(charge) for charge in ledger.counted(table["fingerprint"])]
        found["entries"] = [asdict(entry) for entry in ledger.entries()]
    return {"format": FORMAT, **found}


def _data_set(site: Site, ledger: Ledger, data: DataSet) -> dict[str, Any]:
    rules = site.policy().budget
    [history, *_], counted = ledger.histories(data.fingerprint, "budget.epsilon_total"), ledger.counted(data.fingerprint)
    delta = history.delta if history.delta < 1 else delta_of(rules.delta_total, data.records)
    linked = {"", data.fingerprint, *data.shares}
    counted_as = epsilon_over_runs(history.runs, rules.epsilon_total, delta)
    return {
        "fingerprint": data.fingerprint,
        "records": data.records,
        "unit": data.unit,
        "first_seen": data.first_seen,
        "shares_records_with": data.shares,
        "delta": delta,
        "epsilon": epsilon_spent(history.runs, rules.epsilon_total, delta),
        "composition": composition(history.runs, rules.epsilon_total, delta),
        "epsilon_total": rules.epsilon_total,
        "epsilon_left": max(0.0, rules.epsilon_total - counted_as),
        "unprotected": [_left(e) for e in ledger.entries() if e.kind == "unprotected" and e.body["data"] in linked],
        "runs": [_run(plan_id, counted, delta) for plan_id in dict.fromkeys(c.plan_id for c in counted)],
    }


def _left(entry: Entry) -> dict[str, Any]:
    """What left without any privacy: no ε bounds it."""
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
        "epsilon": epsilon(steps, delta),
        **_trade_off(steps),
    }


def _trade_off(steps: list[Steps]) -> dict[str, float]:
    """What ε and δ of one run do not say: its whole trade-off curve in two figures."""
    return {"gaussian_mu": gaussian_mu(steps), "true_positive_rate": true_positive_rate(steps, 0.01)}


def _event(charge: Charge) -> dict[str, Any]:
    """A charge as an accounting event: `steps` times a Gaussian mechanism of σ, on Poisson samples of rate q."""
    table, steps = asdict(charge), charge.steps
    mechanism = "gaussian" if steps.sample_rate >= 1 else "poisson-subsampled gaussian"
    parameters = {"noise_multiplier": steps.noise_multiplier, "sample_rate": steps.sample_rate, "steps": steps.count}
    return {**table, "mechanism": mechanism, **parameters}
