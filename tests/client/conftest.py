"""A plan on a tiny model, the site of an organization with its own records, and the state that a server would send."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cotune.models.trainable import get_model
from tests.support.multi_task import multi_plan, tagged_plan
from tests.support.sites import make_plan, make_site, records, state_for

__all__ = ["make_plan", "make_site", "multi_plan", "records", "state_for", "tagged_plan"]  # fixtures

torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other


@pytest.fixture(autouse=True, scope="module")
def _one_model_at_a_time() -> Iterator[None]:
    """The tests of a file share its resident models, as simulated clients do, and none of another file."""
    get_model.cache_clear()
    yield
    get_model.cache_clear()
