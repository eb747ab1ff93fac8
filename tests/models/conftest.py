"""A tiny model of any architecture, ready to be shared, and texts of unequal length for it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import pytest
import torch

from cotune.models.trainable import TrainableModel
from tests.support.independence import Verdicts, own_verdicts
from tests.support.tiny_models import shared, texts

__all__ = ["own_verdicts", "shared", "texts"]  # fixtures

torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other


@pytest.fixture
def verdicts(own_verdicts: WeakKeyDictionary[TrainableModel, Verdicts]) -> WeakKeyDictionary[TrainableModel, Verdicts]:
    """Here records are mixed on purpose."""
    return own_verdicts
