"""RFA: the geometric median, the point with the smallest sum of distances to the updates."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.fusions.robust.update_geometry import MAX_PASSES, SMOOTHING, weiszfeld
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
    """Compute the geometric median D = argmin_z Σ p_k ‖Δ_k − z‖ by the smoothed Weiszfeld algorithm.

    From the weighted mean on, z = Σ β_k Δ_k / Σ β_k with β_k = p_k / max(ν, ‖Δ_k − z‖), until z converges: a distant update pulls
    no harder than a near one.

    Args:
        passes: The most passes over the updates after the first one, for the mean. Each divides the pull of a single very distant
            update by about the number of the others.
        smoothing: ν, in the unit of the deltas' norm.
    """
    return (yield from weiszfeld(passes, smoothing))
