"""Events of a run by their names."""

from __future__ import annotations

from typing import Any

from cotune.reporting.documents.events import Event, parse_event


def make_event(name: str, **fields: Any) -> Event:
    """An event as it is read from a file; without all of its fields, or with another name, it is an `OtherEvent`."""
    return parse_event({"event": name, **fields})
