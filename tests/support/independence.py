"""What the trials of independence found, for all models that are equal: tests load the same tiny model again and again."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import pytest

from cotune.models.check_cache import model_key
from cotune.models.trainable import TrainableModel

Verdicts = dict[tuple[object, ...], bool]


class VerdictsByContent:
    """Takes the place of a table by models: `setdefault` gives one table to models with the same files, head and adapters."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], Verdicts] = {}

    def setdefault(self, model: TrainableModel, default: Verdicts) -> Verdicts:
        """Return what is known of models that are equal to this one."""
        return self._found.setdefault(model_key(model), default)


@pytest.fixture
def own_verdicts() -> WeakKeyDictionary[TrainableModel, Verdicts]:
    """As in the product: every model that is loaded is tried. A room whose tests mix records has it as its `verdicts`."""
    return WeakKeyDictionary()
