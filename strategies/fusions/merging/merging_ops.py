"""What fusions of the model-merging literature share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def trim_to_density(delta: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Set all but the entries of the largest magnitudes to 0, over all parameters together.

    Entries as large as the smallest one that is kept are kept too.

    Args:
        delta: Parameter name -> Δ.
        density: Fraction of the entries to keep, in (0, 1]; at least one entry is kept.
    """
    sizes = torch.cat([tensor.flatten() for tensor in delta.values()]).abs()
    keep = max(1, round(density * len(sizes)))
    smallest = sizes.kthvalue(len(sizes) - keep + 1).values
    return {name: torch.where(tensor.abs() >= smallest, tensor, 0.0) for name, tensor in delta.items()}
