"""The point with the least distance to all updates (RFA)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.fusions.robust.robust_ops import MAX_PASSES, SMOOTHING, weiszfeld
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.sums import Sums


@fusion(
    "geometric_median",
    cite="Pillutla et al., IEEE TSP 2022, https://arxiv.org/abs/1912.13445",
    needs=Needs(visibility=Visibility.SUM_2PASS),
    homogeneous=False,
)
def geometric_median(
    *, passes: Annotated[int, Field(ge=1, le=1000)] = MAX_PASSES, smoothing: Annotated[float, Field(gt=0)] = SMOOTHING
) -> Sums:
    """D = argmin_z Σ p_k ‖Δ_k − z‖, by smoothed Weiszfeld: from the weighted mean on, z = Σ β_k Δ_k / Σ β_k, until it stays.

    β_k = p_k / max(ν, ‖Δ_k − z‖), so that who is far away pulls no more than who is near.

    passes: over the updates, after the one for the mean, at most; each divides the pull of one update that is very far away by
    about the number of the others. smoothing: ν, a length of deltas.
    """
    return (yield from weiszfeld(passes, smoothing))
