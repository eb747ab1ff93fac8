"""Fusions played as a round plays them, on deltas given as numbers; and an independent implementation of robust rules."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cotune.strategies.aggregator import Aggregator
from cotune.strategies.registry import get_builtin_components, infer_component
from cotune.strategies.types import Aggregate, RoundContext, Update

Fuse = Callable[..., Any]


def _updates(deltas: Sequence[Any]) -> list[Update]:
    """A delta is a mapping of arrays, or one array: the parameter "x"."""
    found = []
    for k, delta in enumerate(deltas):
        named = delta if isinstance(delta, Mapping) else {"x": delta}
        tensors = {name: torch.as_tensor(np.asarray(values, dtype=np.float64)) for name, values in named.items()}
        found.append(Update(f"org-{k}", 1, tensors, examples=10, steps=1))
    return found


def _play(
    fusion: str,
    deltas: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    context: RoundContext = RoundContext(),
    changes: Sequence[Mapping[str, Any]] | None = None,
    **parameters: Any,
) -> Aggregate:
    updates = [replace(u, **change) for u, change in zip(_updates(deltas), changes or [{}] * len(deltas), strict=True)]
    given = dict(zip([u.organization for u in updates], weights or [1.0] * len(updates), strict=True))
    weighting = infer_component("weighting", "given", lambda update: given[update.organization])
    info = get_builtin_components("fusion")[fusion]
    combination = Aggregator((weighting, {}), (info, info.check(parameters)), context)
    for update in updates:
        combination.add(update)
    return combination.result()


@pytest.fixture(scope="session")
def play() -> Callable[..., Aggregate]:
    """play(fusion, deltas, weights, context=…, changes=… of the updates, **parameters) -> Aggregate."""
    return _play


@pytest.fixture(scope="session")
def fuse() -> Fuse:
    """The same, but the delta as arrays: one, if the deltas were single arrays."""

    def fuse(fusion: str, deltas: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        found = {name: tensor.numpy() for name, tensor in _play(fusion, deltas, *args, **kwargs).delta.items()}
        return found if isinstance(deltas[0], Mapping) else found["x"]

    return fuse


@pytest.fixture
def byzfl() -> Iterator[Any]:
    """Its aggregators, without the package's own __init__, which wants torchvision."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("byzfl is not installed")
    stub = types.ModuleType("byzfl")
    stub.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = stub
    yield importlib.import_module("byzfl.aggregators.aggregators")
    for name in [name for name in sys.modules if name.partition(".")[0] == "byzfl"]:
        del sys.modules[name]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
