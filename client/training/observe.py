"""What a local observer may watch while an organization works: never sent anywhere, losses are private."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Observer = Callable[[str, dict[str, Any]], None]
"""Called with what happened, and its details: "features" and "step" in training; "connected", "disconnected", "begun", "answered"
and "dropped" at a node."""
_observers: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Calls the observer for everything that happens in this process during the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def tell(what: str, **details: Any) -> None:
    for observer in tuple(_observers):
        observer(what, details)
