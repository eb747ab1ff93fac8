"""Greedy soup: the mean of those updates that do not lower the accuracy on the server's validation records."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.strategies.fusions.robust.update_geometry import unweighted_mean
from cotune.strategies.registry import Needs, Visibility, fusion
from cotune.strategies.types import Delta, RoundContext, WeightedUpdate


@fusion(
    "greedy_soup",
    cite="Wortsman et al., ICML 2022, https://arxiv.org/abs/2203.05482, recipe 1",
    needs=Needs(visibility=Visibility.PER_CLIENT, weights=False, server_data=True),
    homogeneous=False,
)
def greedy_soup(updates: Sequence[WeightedUpdate], *, context: RoundContext) -> Delta:
    """Average the best update with each next best one that does not make the mean worse.

    An update or mean is judged by the accuracy of θ + D on the server's validation records: 2n − 1 evaluations.
    """
    score = context.score
    assert score is not None, "needs.server_data"
    own = [score(update.entries) for update in updates]
    first, *others = sorted(range(len(updates)), key=lambda k: own[k], reverse=True)
    soup = [updates[first]]
    best = own[first]
    for k in others:
        reached = score(unweighted_mean([*soup, updates[k]]))
        if reached >= best:
            soup = [*soup, updates[k]]
            best = reached
    return unweighted_mean(soup)
