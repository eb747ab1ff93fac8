"""Task arithmetic: the scaled sum of the updates."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums


@fusion(
    "task_arithmetic",
    cite="Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089",
    needs=Needs(weights=False),
    idempotent=False,
)
def task_arithmetic(*, scale: Annotated[float, Field(gt=0)] = 0.4) -> Sums:
    """Add the deltas rather than averaging them: D = λ Σ Δ_k.

    Args:
        scale: λ; 1 / n gives the plain mean of n updates.
    """
    sums = yield lambda update: update.delta
    return {name: scale * tensor for name, tensor in sums.items()}
