"""A plan on a tiny model, the site of an organization with its own records, and the state that a server would send."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cotune.models import independence
from cotune.models.trainable import get_model
from tests.support.independence import VerdictsByContent
from tests.support.multi_task import multi_plan
from tests.support.sites import make_plan, make_site, records, state_for

__all__ = ["make_plan", "make_site", "multi_plan", "records", "state_for"]  # fixtures

torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def _one_model_at_a_time() -> Iterator[None]:
    """No test sees the resident model of another."""
    get_model.cache_clear()
    yield
    get_model.cache_clear()


@pytest.fixture(scope="session")
def verdicts() -> VerdictsByContent:
    return VerdictsByContent()


@pytest.fixture(autouse=True)
def _equal_models_are_tried_once(verdicts: VerdictsByContent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether records mix is tried for a second with every model that is loaded, and here each test loads its own.

    Equal ones share what was found, so long as nobody mixes records. A test in which somebody does asks for `own_verdicts`.
    """
    monkeypatch.setattr(independence, "_mixing", verdicts)


@pytest.fixture
def own_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests found of equal models is not known."""
    monkeypatch.setattr(independence, "_mixing", VerdictsByContent())
