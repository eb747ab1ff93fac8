"""summary.json of a run that nobody has trained."""

from __future__ import annotations

from typing import Any

from cotune.reporting.documents.summary import RunSummary


def empty_summary(**changes: Any) -> RunSummary:
    """The summary of a real run without privacy and without rounds, but for these keys."""
    privacy = dict.fromkeys(("epsilon", "delta", "clip_norm", "claim", "epsilon_all_models"))
    columns = ("majority", "alone", "alone_without_privacy", "federated", "adapted", "pooled")
    table = {
        "schema": 1,
        "run": "one",
        "plan": "toy",
        "plan_id": "ab" * 32,
        "created": "2026-01-01T00:00:00+00:00",
        "engine": "superlink",
        "status": "finished",
        "stopped": None,
        "client_privacy": None,
        "model": {"base": "some/model", "base_hash": "cd" * 32, "parameters": 10, "shared_parameters": 1},
        "labels": ["bad", "good"],
        "federation": "fed",
        "privacy": {"mode": "none", **privacy, "claim_table": [], "statement": []},
        "partition": None,
        "worth": None,
        "test": {"examples": 0, **dict.fromkeys(columns)},
        "organizations": [],
        "rounds": [],
        "bytes": {"up": 0, "down": 0},
        "seconds": 0.0,
        "peak_memory_bytes": 0,
        "versions": {},
        "reproduce": [],
    }
    return RunSummary.model_validate({**table, **changes})
