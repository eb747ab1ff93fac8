"""Who fits the received model counts more."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.registry import Needs, weighting
from cotune.strategies.types import Update

_LEAST = 1e-3  # nats; who claims less counts for no more, or one organization could take over the model


@weighting(
    "inverse_loss",
    cite="q-FFL (Li et al., ICLR 2020, https://arxiv.org/abs/1905.10497) with a negative exponent",
    needs=Needs(sends=("loss",)),
)
def inverse_loss(update: Update, *, power: Annotated[float, Field(gt=0, le=10)] = 1.0) -> float:
    """w_k = F_k^−power, F_k being the mean loss of the received model on the organization's records.

    power: the larger, the less an organization whose records the model does not fit has to say. A loss is believed as it is told.
    """
    return float(max(update.disclosures["loss"], _LEAST) ** -power)
