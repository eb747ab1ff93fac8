"""A toy federation: a tiny bert, 240 sentences with something to learn in them, and the plan that trains its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from cotune.plan.load import parse_plan
from cotune.plan.schema import Plan
from tests.conftest import sentences, write_csv

NewPlan = Callable[..., Plan]


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For runs that are shared by the tests of a module, which start before the cache of each test is set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cotune-cache"))
        yield


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", sentences(240))


@pytest.fixture(scope="session")
def toy_plan(base_model: Callable[[str], Path], toy_data: Path) -> NewPlan:
    """Changes of top-level keys -> a plan; tables are merged one level deep. Without changes it learns well within seconds."""

    def make(kind: str = "bert", **changes: Any) -> Plan:
        table: dict[str, Any] = {
            "name": "toy",
            "rounds": 3,
            "privacy": "none",
            "model": {"base": str(base_model(kind)), "max_length": 16, "pooling": "mean" if kind == "bert" else "auto"},
            "data": {"source": str(toy_data)},
            "local": {"learning_rate": 5.0, "momentum": 0.9, "batch_size": 0.5, "steps": 5},
            "simulation": {"clients": 2, "partition": "iid"},
        }
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(table.get(key), dict)
            table[key] = {**table[key], **value} if both else value
        return parse_plan(table)

    return make


def final_model(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[n].numpy().tobytes() == other[n].numpy().tobytes() for n in one)
