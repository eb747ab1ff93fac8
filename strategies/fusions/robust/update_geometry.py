"""Operations that robust fusions share: distances between updates, Krum scores, clipping, and the geometric median."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cotune.strategies.order_statistics import fuse_coordinates, mean_rows
from cotune.strategies.sums import Sums, norm, weighted, weighted_mean
from cotune.strategies.tensor_blocks import read_stacks
from cotune.strategies.types import WeightedUpdate, difference

MAX_PASSES = 50  # of the geometric median; without outliers it converges after about twenty
SMOOTHING = 1e-6  # ν of the geometric median, in the unit of the deltas' norm
_CONVERGED = 1e-12  # relative to the center's length: a pass that moves it by less is the last


def unweighted_mean(updates: Sequence[WeightedUpdate]) -> dict[str, Tensor]:
    """Return the unweighted mean of each parameter over the updates that contain it."""
    return fuse_coordinates([update.entries for update in updates], lambda rows, _: mean_rows(rows))


def compute_squared_distances(updates: Sequence[WeightedUpdate]) -> Tensor:
    """Return ‖Δ_i − Δ_j‖² over the parameters that all updates contain, (n, n) in float64.

    Computed from the differences themselves: ‖x‖² + ‖y‖² − 2⟨x, y⟩ can fall below 0.
    """
    deltas = [update.entries for update in updates]
    pairs = torch.zeros(len(updates) * (len(updates) - 1) // 2, dtype=torch.float64)
    for name in deltas[0]:
        if all(name in delta for delta in deltas):
            for _, rows in read_stacks(deltas, name, np.float64):
                pairs += torch.pdist(torch.from_numpy(rows)).square()
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    found[tuple(torch.triu_indices(len(updates), len(updates), offset=1))] = pairs
    return found + found.T


def rank_by_krum_score(distances: Tensor, malicious: int) -> list[int]:
    """Rank updates by their Krum score.

    The score of an update is the sum of the squared distances to its n − f − 2 nearest neighbors (Blanchard et al., NeurIPS 2017,
    section 4). At least one neighbor counts, even if few updates are left. Two updates that are each other's nearest neighbor
    then have the same score, and the one that is nearer to all updates comes first, whatever the order of the updates.

    Args:
        distances: Squared, (n, n).
        malicious: f.

    Returns:
        The numbers of the updates, the best first.
    """
    neighbors = max(1, len(distances) - malicious - 2)
    nearest = distances.sort(dim=1).values[:, 1 : 1 + neighbors].sum(dim=1).tolist()  # without itself
    total = distances.sum(dim=1).tolist()
    return sorted(range(len(distances)), key=lambda k: (nearest[k], total[k]))


def clip_to_norm(delta: Mapping[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """Return the delta, scaled down to `max_norm` if its L2 norm over all parameters is larger."""
    length = norm(delta)
    return {name: tensor * (max_norm / length) for name, tensor in delta.items()} if length > max_norm else dict(delta)


def weiszfeld(passes: int, smoothing: float) -> Sums:
    """Compute the weighted geometric median by smoothed Weiszfeld (Pillutla et al., IEEE TSP 2022, algorithm 1).

    Args:
        passes: The most passes over the updates after the first one, for the mean.
        smoothing: ν, the smallest distance that an update is divided by.
    """
    center = weighted_mean((yield weighted))
    for _ in range(passes):
        before = center
        center = weighted_mean((yield partial(_pull, center=center, smoothing=smoothing)))
        if norm(difference(center, before)) <= _CONVERGED * norm(center):
            break
    return center


def _pull(update: WeightedUpdate, center: Mapping[str, Tensor], smoothing: float) -> dict[str, Tensor]:
    """Return the update's contribution to the next center, weighted by p_k / max(ν, ‖Δ_k − z‖)."""
    distance = max(smoothing, norm(difference(update.delta, center)))
    return {name: tensor.div_(distance) for name, tensor in weighted(update).items()}
