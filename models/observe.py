"""Events for a local observer while a model is prepared, before anything is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from cotune.observers import Observer, Registry

_observers = Registry[Observer]()


def observe_models(observer: Observer) -> AbstractContextManager[None]:
    """Call the observer for everything that takes long before a model can be used in this process, during the block.

    Args:
        observer: Called with the event and its fields: "map" with `base`, `done` and `total` texts, while the map of a
            base model's feature is fitted.
    """
    return _observers.register(observer)


def notify(what: str, **details: Any) -> None:
    """Tell all observers of an event."""
    _observers.notify(what, details)
