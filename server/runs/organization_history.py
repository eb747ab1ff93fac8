"""What the finished rounds and the events of a run say about an organization. Loads no PyTorch, for `cotune server status`."""

from __future__ import annotations

from collections.abc import Iterable

from cotune.reporting.documents.events import Event, LateUpdateReceived, UpdateReceived
from cotune.reporting.documents.rounds import RoundEntry


def get_reported_epsilon(history: Iterable[RoundEntry]) -> dict[str, float]:
    """Return organization -> ε as it stated it last."""
    return {name: value for entry in history for name, value in entry.epsilon.items()}


def get_last_weight(history: Iterable[RoundEntry], name: str) -> float | None:
    """Return the share of an organization in the last round that it took part in, of 1; None where it took part in none."""
    shares = [entry.weights[name] for entry in history if name in entry.weights]
    return shares[-1] if shares else None


def get_received_bytes(events: Iterable[Event], name: str) -> int:
    """Return the size of all updates of an organization that were received, interrupted rounds included."""
    received = (event for event in events if isinstance(event, UpdateReceived | LateUpdateReceived))
    return sum(event.bytes for event in received if event.organization == name)
