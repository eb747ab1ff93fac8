"""What a local observer may watch while an organization works: never sent anywhere, losses are private."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from cotune.observers import Observer, Registry

_observers = Registry[Observer]()


def observe_client(observer: Observer) -> AbstractContextManager[None]:
    """Call the observer for everything that an organization does in this process, during the block.

    Args:
        observer: Called with the event and its fields: "features" and "step" in training; "connected", "disconnected", "begun",
            "answered" and "dropped" at a node.
    """
    return _observers.register(observer)


def notify(what: str, **details: Any) -> None:
    """Tell all observers of an event."""
    _observers.notify(what, details)
