"""What a federation uses where nobody has chosen: one member of four or more can neither take the model over nor stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from cotune.strategies.fusions.robust.robust_ops import MAX_PASSES, SMOOTHING, clip_to_norm, weiszfeld
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.sums import Sums, norm, total
from cotune.strategies.types import Aggregate, Delta, WeightedUpdate

FEWEST = 4  # updates, from which on the one that lies can be told from the others
_MAX_SHARE_OF_FEW = 1.5  # times an equal share: what an update counts at most where there are fewer


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
    """D = argmin_z Σ p_k ‖Δ_k − z‖ of four or more updates, none longer than a few times their median norm, p_k ≤ share.

    Of fewer it is their weighted mean: two or three organizations cannot tell who lies. Then p_k is at most 1.5 times an equal
    share, and of three updates none is longer than ratio times the middle one.

    share: of the weight that one update has at most. The geometric median withstands anyone who holds less than a half, so that
    an
    organization with most of the records, or one that states a huge number, does not decide alone. ratio: to the median norm; a
    longer update is shortened to it.
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
    """Shares of the sum, p_k = min(w_k, c) / Σ_j min(w_j, c), with the largest c for which none is above `most`.

    Args:
        weights: Above 0.
        most: 1 / n or more.
    """
    falling = sorted(weights, reverse=True)
    cut = falling[-1]  # all alike, where not even the smallest is left as it is
    for count, largest in enumerate(falling):  # the `count` largest are cut to c = most · Σ min(w_j, c)
        found = most * sum(falling[count:]) / (1 - count * most) if count * most < 1 else 0.0
        if largest <= found:
            cut = found
            break
    kept = [min(weight, cut) for weight in weights]
    return [weight / sum(kept) for weight in kept]


def compute_max_norm(norms: Sequence[float], ratio: float) -> float:
    """How long an update may be: ratio times the (lower) median norm; of one or two updates without end."""
    return ratio * sorted(norms)[(len(norms) - 1) // 2] if len(norms) > 2 else float("inf")


def _bounded(update: WeightedUpdate, share: float, longest: float) -> WeightedUpdate:
    whole = WeightedUpdate(update.update, share, update.state)  # a new one, as an update keeps its delta in float64
    return WeightedUpdate(replace(update.update, delta=clip_to_norm(whole.delta, longest)), share, update.state)


def _played(passes: Sums, weighed: Callable[[], Iterable[WeightedUpdate]]) -> Delta:
    """A rule of sums, on updates that are all at hand and made again for each pass, so that one at a time is in memory."""
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
