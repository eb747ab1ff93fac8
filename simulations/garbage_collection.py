"""How often Python looks for garbage while rounds are played."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_COLLECTED_AFTER = (10_000, 20, 20)  # objects that were made and not freed, then collections of younger ones


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Let the garbage collector look at libraries and model less often: most of its work in rounds of small models."""
    before = gc.get_threshold()
    gc.set_threshold(*map(max, before, _COLLECTED_AFTER))
    try:
        yield
    finally:
        gc.set_threshold(*before)
