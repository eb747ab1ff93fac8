"""Store and restore the state of Flower's strategies between rounds: their attributes as tensors, for checkpoints.

Each tensor's name is JSON: the path to the value from the attribute on, and the value's type.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor


def name_digest(names: Sequence[str]) -> Tensor:
    """Return the SHA-256 of parameter names, as a tensor of 32 bytes."""
    return torch.tensor(list(hashlib.sha256("\n".join(names).encode()).digest()), dtype=torch.uint8)


def list_state(strategy: Strategy) -> Iterator[tuple[str, dict[str, Tensor] | None]]:
    """Yield each attribute's name with its value as tensors; None for a value that cannot be stored."""
    for name, value in vars(strategy).items():
        try:
            yield name, {json.dumps(path): tensor for path, tensor in _leaves([name], value)}
        except TypeError:
            yield name, None


def _leaves(path: list[Any], value: Any) -> Iterator[tuple[list[Any], Tensor]]:
    if isinstance(value, Mapping):
        kind = "arrays" if isinstance(value, ArrayRecord) else "dict"
        yield [*path, kind], torch.zeros(0)
        for i, (key, item) in enumerate(value.items()):
            if not isinstance(key, str | int):
                raise TypeError
            yield from _leaves([*path, [i, key]], item)  # with its position, which a checkpoint does not preserve
    elif isinstance(value, list | tuple):
        yield [*path, "list" if isinstance(value, list) else "tuple"], torch.zeros(0)
        for i, item in enumerate(value):
            yield from _leaves([*path, i], item)
    elif isinstance(value, np.ndarray | Array):
        array = value.numpy() if isinstance(value, Array) else value
        yield [*path, "array" if isinstance(value, Array) else "ndarray"], torch.from_numpy(np.array(array))
    elif isinstance(value, str):
        yield [*path, "text"], torch.tensor(list(value.encode()), dtype=torch.uint8)
    elif value is None or isinstance(value, bool | int | float | np.generic):
        kind = "none" if value is None else type(value.item() if isinstance(value, np.generic) else value).__name__
        yield [*path, kind], torch.from_numpy(np.array(value if value is not None else 0))
    else:
        raise TypeError


def equal(held: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> bool:
    """Return whether two stored values are the same; False if there is no earlier one."""
    return before is not None and held.keys() == before.keys() and all(torch.equal(held[n], before[n]) for n in held)


def restore_state(strategy: Strategy, memory: Mapping[str, Tensor]) -> None:
    """Set the strategy's attributes from what `list_state` yielded; the order of the tensors does not matter."""
    found = [(json.loads(path), tensor) for path, tensor in memory.items()]
    for name in {path[0] for path, _ in found}:
        setattr(strategy, name, _value([(path[1:], tensor) for path, tensor in found if path[0] == name]))


def _value(leaves: Sequence[tuple[list[Any], Tensor]]) -> Any:
    kind, tensor = next((path[0], tensor) for path, tensor in leaves if len(path) == 1)
    places: list[Any] = []
    for place in (path[0] for path, _ in leaves if len(path) > 1):
        if place not in places:
            places.append(place)
    items = [_value([(path[1:], t) for path, t in leaves if len(path) > 1 and path[0] == place]) for place in sorted(places)]
    if kind in ("list", "tuple"):
        return items if kind == "list" else tuple(items)
    if kind in ("dict", "arrays"):
        named = {key: item for (_, key), item in zip(sorted(places), items, strict=True)}
        return named if kind == "dict" else ArrayRecord(named)
    if kind in ("ndarray", "array"):
        array = tensor.numpy().copy()
        return array if kind == "ndarray" else Array(array)
    if kind == "text":
        return bytes(tensor.tolist()).decode()
    return None if kind == "none" else tensor.item()
