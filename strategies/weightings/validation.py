"""Weights by the accuracy that each update gives on the server's validation records."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.registry import Needs, Visibility, weighting
from cotune.strategies.types import RoundContext, Update


@weighting(
    "validation",
    cite="compare Xie, Koyejo & Gupta, ICML 2019, https://arxiv.org/abs/1805.10032 (Zeno)",
    needs=Needs(visibility=Visibility.PER_CLIENT, server_data=True),
)
def validation(update: Update, *, context: RoundContext, power: Annotated[float, Field(gt=0, le=100)] = 1.0) -> float:
    """Weight by accuracy on the server's validation records: w_k = a_k^power, a_k the accuracy of θ + Δ_k.

    Takes one pass over the validation records for each update.

    Args:
        update: Δ_k.
        context: Its `score` is required.
        power: The larger, the more the best updates dominate.
    """
    assert context.score is not None, "a plan without validation records is refused"
    return float(context.score(update.delta) ** power)
