"""The default fusion of a federation: one of four or more members can neither take over the model nor stop its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from cotune.strategies.fusions.robust.update_geometry import MAX_PASSES, SMOOTHING, clip_to_norm, weiszfeld
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.sums import Sums, norm, total
from cotune.strategies.types import Aggregate, Delta, WeightedUpdate

FEWEST = 4  # updates, the fewest among which a hostile one stands out from the others
_MAX_SHARE_OF_FEW = 1.5  # times an equal share: the largest share of an update if there are fewer


@fusion(
    "robust",
    cite="Pillutla et al., IEEE TSP 2022, https://arxiv.org/abs/1912.13445, with bounds on weights and norms",
    needs=Needs(visibility=Visibility.PER_CLIENT),
)
def robust(
    updates: Sequence[WeightedUpdate],
    *,
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.4,
    ratio: Annotated[float, Field(ge=1, le=1000)] = 3.0,
) -> Aggregate:
    """Take the geometric median of four or more updates with bounded shares and norms; the bounded mean of fewer.

    D = argmin_z Σ p_k ‖Δ_k − z‖, with p_k ≤ share and no update longer than a few times the median norm. Two or three updates do
    not show which one is hostile, so they are averaged by weight; p_k is then at most 1.5 times an equal share, and of three
    updates none is longer than `ratio` times the middle one.

    Args:
        updates: Those of weight 0 are left out.
        share: Largest fraction of the total weight that one update can have. The geometric median withstands any update with less
            than half the weight, so that an organization with most of the records, or one that states a huge number, does not
            decide alone.
        ratio: Longest norm of an update, in multiples of the median norm; a longer one is scaled down.
    """
    counted = [update for update in updates if update.scalar > 0]
    shares = bounded_shares([update.scalar for update in counted], max(share, _MAX_SHARE_OF_FEW / len(counted)))
    longest = compute_max_norm([norm(update.entries) for update in counted], ratio)

    def bounded() -> Iterator[WeightedUpdate]:
        return (_bounded(update, p, longest) for update, p in zip(counted, shares, strict=True))

    found = _played(weiszfeld(MAX_PASSES if len(counted) >= FEWEST else 0, SMOOTHING), bounded)
    by_name = {update.update.organization: p for update, p in zip(counted, shares, strict=True)}
    return Aggregate(found, weights=by_name)


def bounded_shares(weights: Sequence[float], most: float) -> list[float]:
    """Return the shares p_k = min(w_k, c) / Σ_j min(w_j, c), with the largest c for which no share is above `most`.

    Args:
        weights: w_k, n of them, all above 0.
        most: The largest share, at least 1 / n.
    """
    falling = sorted(weights, reverse=True)
    cut = falling[-1]  # equal shares, if even the smallest weight is cut
    for count, largest in enumerate(falling):  # the `count` largest are cut to c = most · Σ min(w_j, c)
        found = most * sum(falling[count:]) / (1 - count * most) if count * most < 1 else 0.0
        if largest <= found:
            cut = found
            break
    kept = [min(weight, cut) for weight in weights]
    return [weight / sum(kept) for weight in kept]


def compute_max_norm(norms: Sequence[float], ratio: float) -> float:
    """Return the longest norm of an update: `ratio` times the (lower) median norm; infinity for one or two updates."""
    return ratio * sorted(norms)[(len(norms) - 1) // 2] if len(norms) > 2 else float("inf")


def _bounded(update: WeightedUpdate, share: float, longest: float) -> WeightedUpdate:
    whole = WeightedUpdate(update.update, share, update.state)  # a new object, as each one caches its delta in float64
    return WeightedUpdate(replace(update.update, delta=clip_to_norm(whole.delta, longest)), share, update.state)


def _played(passes: Sums, weighed: Callable[[], Iterable[WeightedUpdate]]) -> Delta:
    """Run a rule of sums on stored updates, which are created again for each pass, so that only one is in memory at a time."""
    contribute = next(passes)
    sums = dict[str, Tensor]()
    while True:
        for update in weighed():
            total(sums, contribute(update))
        try:
            contribute = passes.send(sums)
            sums = {}
        except StopIteration as end:
            found: Delta = end.value
            return found
