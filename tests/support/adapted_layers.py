"""A model of one adapted layer and a head, organizations that have trained it, and what a fusion makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cotune.models.adapters.adapter import Adapter
from cotune.strategies.aggregator import Aggregator
from cotune.strategies.registry import get_builtin_components
from cotune.strategies.types import RoundContext, Update

A = "layer.lora_A.default.weight"
B = "layer.lora_B.default.weight"
W = "layer.weight"
HEAD = "classifier.weight"
IN = 7
OUT = 5


def adapter(rank: int, *, scale: float = 0.5, transposed: bool = False) -> Adapter:
    return Adapter(a=A, b=B, weight=W, scale=scale, rank=rank, transposed=transposed)


def state_of(rank: int, *, seed: int = 0, transposed: bool = False) -> dict[str, Tensor]:
    """float32, as a server holds it."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {A: (rank, IN), B: (OUT, rank), W: (IN, OUT) if transposed else (OUT, IN), HEAD: (2, 3)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def deltas_of(state: Mapping[str, Tensor], ranks: Sequence[int], *, names: Sequence[str] = (A, B, HEAD), seed: int = 1) -> Any:
    """Random deltas, one of each rank: what organizations send that hold the first rows of A and columns of B alone."""
    rng = torch.Generator().manual_seed(seed)
    whole = [{name: torch.randn(state[name].shape, generator=rng) for name in names} for _ in ranks]
    return [{n: _cut(n, t, rank) for n, t in delta.items()} for rank, delta in zip(ranks, whole, strict=True)]


def _cut(name: str, tensor: Tensor, rank: int) -> Tensor:
    return tensor[:rank] if name == A else tensor[:, :rank] if name == B else tensor


def products(state: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensor:
    """Σ p_k B_k A_k, densely."""
    found: Tensor = torch.zeros(())
    for delta, weight in zip(deltas, weights, strict=True):
        rank = delta[B].shape[1]
        b = state[B][:, :rank].double() + delta[B]
        a = state[A][:rank].double() + delta.get(A, 0)
        found = found + weight / sum(weights) * b @ a
    return found


def fused(
    name: str,
    state: Mapping[str, Tensor],
    deltas: Sequence[Mapping[str, Tensor]],
    counts: Sequence[int],
    *layers: Adapter,
    round: int = 1,
    **parameters: Any,
) -> dict[str, Tensor]:
    """The next state in float64, by the driver of the rounds: weighted by `counts`."""
    context = RoundContext(round=round, seed=3, state=state, adapters=layers)
    weighting = get_builtin_components("weighting")["examples"]
    fusion = get_builtin_components("fusion")[name]
    driver = Aggregator((weighting, {"cap": 0}), (fusion, fusion.check(parameters)), context)
    for i, (delta, count) in enumerate(zip(deltas, counts, strict=True)):
        driver.add(Update(f"org-{i}", round, delta, examples=count, steps=1))
    moved = {n: state[n].double() + d for n, d in driver.result().delta.items()}
    return {**{n: t.double() for n, t in state.items()}, **moved}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other.to(one.dtype), rtol=tolerance, atol=tolerance)
