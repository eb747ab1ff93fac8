"""Deltas side by side, for rules that compare them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cotune.strategies.types import WeightedUpdate


def stacked(updates: Sequence[WeightedUpdate]) -> dict[str, Tensor]:
    """Of every parameter the deltas of those that sent it, n × its shape, in float64."""
    names = dict.fromkeys(name for update in updates for name in update.delta)
    return {name: torch.stack([u.delta[name] for u in updates if name in u.delta]) for name in names}


def unweighted_mean(updates: Sequence[WeightedUpdate]) -> dict[str, Tensor]:
    """The plain mean of every parameter over those that sent it."""
    return {name: deltas.mean(dim=0) for name, deltas in stacked(updates).items()}


def compute_squared_distances(updates: Sequence[WeightedUpdate]) -> Tensor:
    """‖Δ_i − Δ_j‖² over the parameters that all sent: n × n, in float64.

    From the differences themselves: ‖x‖² + ‖y‖² − 2⟨x, y⟩ can fall below 0.
    """
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for deltas in stacked(updates).values():
        if len(deltas) == len(updates):
            rows = deltas.reshape(len(updates), -1)
            found += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    return found
