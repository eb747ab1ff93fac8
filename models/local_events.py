"""Events for a local observer: what takes long while a model is prepared, and what did not fit into memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from cotune.observers import Observer, Registry

_observers = Registry[Observer]()


def observe_models(observer: Observer) -> AbstractContextManager[None]:
    """Call the observer for everything that this process has to tell of its models, during the block.

    Args:
        observer: Called with the event and its fields: "map" with `base`, `done` and `total` texts, while the map of a
            base model's feature is fitted; "physical_batch" with `rows`, `before` and `device`, when a batch of `before`
            rows did not fit into memory and `rows` are tried (`models.physical_batch`).
    """
    return _observers.register(observer)


def notify(what: str, **details: Any) -> None:
    """Tell all observers of an event."""
    _observers.notify(what, details)
