"""Weights that fall with the loss of the received model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.registry import Needs, weighting
from cotune.strategies.types import Update

_LEAST = 1e-3  # nats; smaller losses count as this one, or one organization could take over the model


@weighting(
    "inverse_loss",
    cite="q-FFL (Li et al., ICLR 2020, https://arxiv.org/abs/1905.10497) with a negative exponent",
    needs=Needs(sends=("loss",)),
)
def inverse_loss(update: Update, *, power: Annotated[float, Field(gt=0, le=10)] = 1.0) -> float:
    """Favor organizations whose records the received model fits: w_k = F_k^−power, F_k the mean loss on them.

    The server cannot verify the loss that an organization reports.

    Args:
        power: The larger, the less organizations with a high loss count.
    """
    return float(max(update.disclosures["loss"], _LEAST) ** -power)
