"""Attacks use the fixtures of the rooms that they attack."""

from weakref import WeakKeyDictionary

import pytest

from cotune.models.trainable import TrainableModel
from tests.support.console import _logging_as_it_was, cotune, folder
from tests.support.independence import Verdicts, own_verdicts
from tests.support.run_folders import new_run
from tests.support.sites import make_plan, make_site, records, state_for

__all__ = [  # fixtures
    "_logging_as_it_was",
    "cotune",
    "folder",
    "make_plan",
    "make_site",
    "new_run",
    "own_verdicts",
    "records",
    "state_for",
]


@pytest.fixture
def verdicts(own_verdicts: WeakKeyDictionary[TrainableModel, Verdicts]) -> WeakKeyDictionary[TrainableModel, Verdicts]:
    """Here records are mixed on purpose."""
    return own_verdicts
