"""What an organisation's ledger says, for its own people and for auditors: per data set, per run, ε and what is left."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cotune.client.site import Site
from cotune.privacy.accounting import delta_of, epsilon
from cotune.privacy.ledger import Charge, DataSet

__all__ = ["export", "overview"]


def overview(site: Site) -> dict[str, Any]:
    """The ledger as plain values; ε is composed anew from the charges, at the policy's δ for each data set.

    Raises PrivacyError for a ledger that is damaged, and makes none where there is none.
    """
    if not site.ledger_file.exists():
        return {"organisation": site.organisation, "head": None, "data_sets": [], "unassigned": []}
    ledger = site.ledger()
    charges, entries = ledger.charges(), ledger.entries()
    return {
        "organisation": site.organisation,
        "head": entries[-1].hash if entries else None,
        "data_sets": [_data_set(site, data, charges) for data in ledger.data_sets()],
        "unassigned": [_event(charge) for charge in charges if not charge.data],
    }


def export(site: Site) -> dict[str, Any]:
    """The overview with every event that counts for each data set, and the log itself: all that an auditor needs.

    ε follows from the events with dp-accounting alone, and the hashes of the log from SHA-256 alone (see docs/ledger.md).
    """
    found = overview(site)
    if site.ledger_file.exists():
        ledger = site.ledger()
        charges = ledger.charges()
        for table, data in zip(found["data_sets"], ledger.data_sets(), strict=True):
            table["events"] = [_event(charge) for charge in _counted(data, charges)]
        found["entries"] = [asdict(entry) for entry in ledger.entries()]
    return {"format": "cotune ledger 1", **found}


def _data_set(site: Site, data: DataSet, charges: list[Charge]) -> dict[str, Any]:
    rules = site.policy().budget
    delta, counted = delta_of(rules.delta_total, data.records), _counted(data, charges)
    spent = epsilon([c.steps for c in counted], delta)
    return {
        "fingerprint": data.fingerprint,
        "records": data.records,
        "first_seen": data.first_seen,
        "shares_records_with": data.shares,
        "delta": delta,
        "epsilon": spent,
        "epsilon_total": rules.epsilon_total,
        "epsilon_left": max(0.0, rules.epsilon_total - spent),
        "runs": [_run(plan_id, counted, delta) for plan_id in dict.fromkeys(c.plan_id for c in counted)],
    }


def _counted(data: DataSet, charges: list[Charge]) -> list[Charge]:
    """The charges on a data set: its own, those of data sets that share a record with it, and those of unknown data."""
    return [c for c in charges if c.data in ("", data.fingerprint) or c.data in data.shares]


def _run(plan_id: str, counted: list[Charge], delta: float) -> dict[str, Any]:
    own = [c for c in counted if c.plan_id == plan_id]
    return {
        "plan_id": plan_id,
        "plan": next((c.plan for c in own if c.plan), ""),
        "rounds": len({c.round for c in own}),
        "steps": sum(c.steps.count for c in own if c.purpose == "training"),
        "interrupted": sum(c.state == "reserved" for c in own),
        "first": own[0].at,
        "last": own[-1].at,
        "epsilon": epsilon([c.steps for c in own], delta),
    }


def _event(charge: Charge) -> dict[str, Any]:
    """A charge as an accounting event: `steps` times a Gaussian mechanism of σ, on Poisson samples of rate q."""
    table, steps = asdict(charge), charge.steps
    mechanism = "gaussian" if steps.sample_rate >= 1 else "poisson-subsampled gaussian"
    parameters = {"noise_multiplier": steps.noise_multiplier, "sample_rate": steps.sample_rate, "steps": steps.count}
    return {**table, "mechanism": mechanism, **parameters}
