"""How the deltas of a round become one. A fusion is fed one update at a time, so that the server need not hold them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cotune.strategies.updates import Delta

__all__ = ["FUSIONS", "Fusion", "WeightedMean"]


class Fusion(Protocol):
    """Adds deltas one by one and gives the fused delta at the end."""

    def add(self, delta: Delta, weight: float) -> None: ...

    def result(self) -> Delta: ...


class WeightedMean:
    """D = Σ w_k Δ_k / Σ w_k per parameter, over the clients that sent it (FedAvg; McMahan et al., AISTATS 2017).

    Sums are kept in float64, one tensor per parameter; the result is float64. A weight is finite and positive.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, delta: Delta, weight: float) -> None:
        """Raises ValueError for a weight that is not a positive number."""
        if not (0 < weight < float("inf")):
            raise ValueError(f"expected a positive weight, got {weight}")
        for name, tensor in delta.items():
            if name in self._sums:
                self._sums[name].add_(tensor.to(torch.float64), alpha=weight)
            else:
                self._sums[name] = tensor.to(torch.float64) * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def result(self) -> Delta:
        return {name: total / self._weights[name] for name, total in self._sums.items()}


FUSIONS: dict[str, Callable[[], Fusion]] = {"mean": WeightedMean}
