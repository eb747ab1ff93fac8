"""Who is served badly counts more."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.registry import Needs, weighting
from cotune.strategies.types import Update

_LEAST = 1e-10  # nats, as in q_fedavg: where nobody has any loss left, noised or not, everybody counts alike


@weighting(
    "q_fair",
    cite="Li et al., ICLR 2020, https://arxiv.org/abs/1905.10497 (q-FFL)",
    needs=Needs(sends=("loss",)),
)
def q_fair(update: Update, *, q: Annotated[float, Field(ge=0, le=10)] = 1.0) -> float:
    """w_k = F_k^q, F_k being the mean loss of the received model on the organization's records.

    The direction of steepest descent on Σ F_k^(q+1), every organization being one of equals; the length of the paper's step is
    left to the server optimizer. q: 0 counts everybody alike, large q the worst served alone. A loss is believed as it is told.
    """
    return float(max(update.disclosures["loss"], _LEAST) ** q)
