"""Events of a run by their names, and entries of its rounds."""

from __future__ import annotations

from typing import Any

from cotune.reporting.documents.events import Event, parse_event
from cotune.reporting.documents.rounds import RoundEntry


def make_event(name: str, **fields: Any) -> Event:
    """An event as it is read from a file; without all of its fields, or with another name, it is an `OtherEvent`."""
    return parse_event({"event": name, **fields})


def round_entry(**fields: Any) -> RoundEntry:
    """A finished round, of which these fields are known."""
    return RoundEntry.model_validate({"round": 1, "stage": "head", **fields})
