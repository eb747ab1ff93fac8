"""By what each update does for records that the server holds."""

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
    """w_k = a_k^power, a_k being the accuracy of θ + Δ_k on the server's validation records.

    power: the larger, the more the best updates decide. One pass over the validation records for each update.
    """
    assert context.score is not None, "a plan without validation records is refused"
    return float(context.score(update.delta) ** power)
