"""Trimming of deltas, which several fusions of the model-merging literature share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cotune.strategies.tensor_blocks import dtype_of, read_blocks, shape_of


def smallest_kept(delta: Mapping[str, Tensor], density: float) -> float:
    """Return the smallest magnitude among the entries to keep, which are the largest over all parameters together.

    Args:
        delta: Parameter name -> Δ.
        density: Fraction of the entries to keep, in (0, 1]; at least one entry is kept.
    """
    counts = {name: math.prod(shape_of(delta, name)) for name in delta}
    is_single = all(dtype_of(delta, name) == np.float32 for name in delta)
    sizes = torch.empty(sum(counts.values()), dtype=torch.float32 if is_single else torch.float64).numpy()
    start = 0
    for name, count in counts.items():
        for where, block in read_blocks(delta, name):
            sizes[start + where.start : start + where.stop] = np.abs(block)
        start += count
    keep = max(1, round(density * len(sizes)))
    sizes.partition(len(sizes) - keep)
    return float(sizes[len(sizes) - keep])


def trim_to_density(delta: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Set all entries but those of the largest magnitudes, over all parameters together, to 0.

    Entries that tie with the smallest one to keep are kept, too. For the arguments see `smallest_kept`.
    """
    smallest = smallest_kept(delta, density)
    return {name: torch.where(tensor.abs() >= smallest, tensor, 0.0) for name, tensor in delta.items()}
