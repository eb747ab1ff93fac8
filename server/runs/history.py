"""What the finished rounds and the events of a run say about an organization. Loads no PyTorch, for `cotune server status`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def epsilon_stated(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Organization -> ε as it stated it last."""
    return {name: _number(value) for entry in history for name, value in entry["epsilon"].items()}


def weight_of(history: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """The share of an organization in the last round that it took part in, of 1; None where it took part in none."""
    shares = [entry["weights"][name] for entry in history if name in entry.get("weights", {})]
    return float(shares[-1]) if shares else None


def bytes_of(events: Iterable[Mapping[str, Any]], name: str) -> int:
    """Of the updates of an organization that were received, interrupted rounds included."""
    own = (event for event in events if event.get("organization") == name)
    return sum(int(event["bytes"]) for event in own if event["event"] in ("update_received", "late_update_received"))


def _number(value: float) -> float:
    """Older runs admitted whatever was stated; an integer in JSON may be larger than any float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
