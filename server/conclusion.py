"""After the last round of a real run: the exported model, summary.json and report.html.

A coordinator knows less than a simulation: nothing of an organisation's records, and of its ε what it states. What is not known
is None in the summary, and no sentence of the report is about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cotune.models.durable import write_durably
from cotune.models.export import export_model
from cotune.models.holdings import HoldingsFile
from cotune.models.tasks import majority
from cotune.plan.card import CARD
from cotune.privacy.claim import claim_of
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.statement import stated
from cotune.server.base import model_here
from cotune.server.delivery import confirmed
from cotune.server.events import read_events
from cotune.server.report import write_report
from cotune.server.run_folder import Progress, RunFolder
from cotune.server.step import served_of
from cotune.server.strikes import left_out
from cotune.server.summary import dumps, identity, performance, run_card

_TOLD = "what an organization's own policy lets out without noise"
_NOT_KNOWN = (
    "epsilon_all_models",
    "examples",
    "labels",
    "alone",
    "personal",
    "gain",
    "common",
    "worth",
    "adaptation",
    "delta",
    "noise_multiplier",
    "sample_rate",
    "steps",
    "own",
)


def conclude(folder: RunFolder) -> dict[str, Any]:
    """Writes model/, summary.json and report.html, each in one step, and returns the summary; again, it replaces them.

    Where every organisation has a model of its own there is no model/. The folder must have a finished round.
    """
    progress = folder.load()
    summary = summarise(folder, progress)
    if not folder.plan.keeps_personal:
        _export(folder, progress, summary)
    write_durably(folder.path / "summary.json", dumps(summary))
    write_report(summary, folder.path / "report.html")
    folder.events.tell("run_concluded", summary=str(folder.path / "summary.json"))
    return summary


def _export(folder: RunFolder, progress: Progress, summary: Mapping[str, Any]) -> None:
    model = model_here(folder)
    model.load(served_of(folder.plan, progress))
    export_model(model, folder.path / "model", {CARD: run_card(folder.plan, summary, model.loaded.max_length)})


def summarise(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """The summary of a real run as plain values (schema 1)."""
    events = read_events(folder.path / "events.jsonl") if (folder.path / "events.jsonl").exists() else []
    return {
        **identity(folder, progress),
        "federation": folder.file.federation,
        "privacy": _privacy(folder, progress),
        "partition": None,
        "worth": None,
        "test": _test(folder, progress),
        "organisations": [_organisation(folder, who.name, progress, events) for who in folder.file.participants],
        **performance(progress, sum(float(entry["seconds"]) for entry in progress.history)),
        "reproduce": [f"cotune server run {folder.file.federation}"],
    }


def _privacy(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    privacy, spent = folder.plan.privacy, epsilon_stated(progress.history)
    known = privacy if isinstance(privacy, RecordPrivacy) else None
    claim = claim_of(known, None, not_covered=(_TOLD, "the coordinator's test set")) if known else None
    return {
        "mode": "record" if known else "none",
        "epsilon": known.epsilon if known else None,
        "delta": str(known.delta) if known else None,
        "clip_norm": known.clip_norm if known else None,
        "claim": claim.as_dict() if claim else None,
        "claim_table": claim.rows() if claim else [],
        "epsilon_all_models": None,
        "statement": stated(
            known,
            spent,
            client_level=folder.plan.client_privacy is not None,
            silent=len(folder.file.participants) - len(spent),
        ),
    }


def _test(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Of the coordinator's own test set; without one, nothing was measured."""
    document, metrics = folder.path / "test" / "data.json", progress.history[-1]["metrics"]
    nothing = {
        "examples": 0,
        "majority": None,
        "alone": None,
        "alone_without_privacy": None,
        "federated": metrics,
        "adapted": None,
        "pooled": None,
    }
    if not document.exists():
        return nothing
    test = HoldingsFile.read(document, folder.plan.labels)
    constant = majority(test.truth, test.truth, len(folder.plan.labels))
    return {**nothing, "examples": len(test), "majority": constant.as_dict()}


def epsilon_stated(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Organisation -> ε as it stated it last."""
    return {name: _number(value) for entry in history for name, value in entry["epsilon"].items()}


def _number(value: float) -> float:
    """Older runs admitted whatever was stated; an integer in JSON may be larger than any float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _organisation(folder: RunFolder, name: str, progress: Progress, events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    privacy = folder.plan.privacy
    return {
        "name": name,
        **dict.fromkeys(_NOT_KNOWN),
        "epsilon_spent": epsilon_stated(progress.history).get(name),
        "epsilon_allowed": privacy.epsilon if isinstance(privacy, RecordPrivacy) else None,
        "rounds": sum(name in entry["participants"] for entry in progress.history),
        "bytes_up": bytes_of(events, name),
        "weight": weight_of(progress.history, name),
        "dropped": sum(dropped["organisation"] == name for entry in progress.history for dropped in entry["dropped"]),
        "quarantined": sum(name in entry["quarantined"] for entry in progress.history),
        "left_out": name in left_out(folder, progress.history),
        "delivered": name in confirmed(folder),
    }


def weight_of(history: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """The share of an organization in the last round that it took part in, of 1; None where it took part in none."""
    shares = [entry["weights"][name] for entry in history if name in entry.get("weights", {})]
    return float(shares[-1]) if shares else None


def bytes_of(events: Iterable[Mapping[str, Any]], name: str) -> int:
    """Of the updates of an organisation that were received, interrupted rounds included."""
    own = (event for event in events if event.get("organisation") == name)
    return sum(int(event["bytes"]) for event in own if event["event"] in ("update_received", "late_update_received"))
