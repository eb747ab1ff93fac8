"""The weighted mean."""

from __future__ import annotations

from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums, divide, weighted


@fusion(
    "mean",
    cite="McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629, algorithm 1",
    needs=Needs(by_parameter=True, mixed_ranks=True),
)
def mean() -> Sums:
    """Average the deltas by weight, D = Σ w_k Δ_k / Σ w_k, each entry over the organizations that sent it."""
    sums = yield weighted
    return divide(dict(sums))
