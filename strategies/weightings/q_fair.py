"""Weights that grow with the loss of the received model (q-fair federated learning)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.registry import Needs, weighting
from cotune.strategies.types import Update

_LEAST = 1e-10  # nats, as in q_fedavg: if all losses, noised or not, are 0 or less, all organizations count the same


@weighting(
    "q_fair",
    cite="Li et al., ICLR 2020, https://arxiv.org/abs/1905.10497 (q-FFL)",
    needs=Needs(sends=("loss",)),
)
def q_fair(update: Update, *, q: Annotated[float, Field(ge=0, le=10)] = 1.0) -> float:
    """Favor organizations whose records the received model fits badly: w_k = F_k^q, F_k the mean loss on them.

    With equal organizations this is the direction of steepest descent on Σ F_k^(q+1); the length of the step, which the paper
    prescribes, is left to the server optimizer. The server cannot verify the loss that an organization reports.

    Args:
        q: 0 weights all organizations equally; a large q counts almost only those with the highest loss.
    """
    return float(max(update.disclosures["loss"], _LEAST) ** q)
