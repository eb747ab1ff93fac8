"""Weights by number of records."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cotune.strategies.registry import weighting
from cotune.strategies.types import Update


@weighting("examples", cite="McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629, algorithm 1")
def examples(update: Update, *, cap: Annotated[int, Field(ge=0)] = 0) -> float:
    """Weight by the number of records that the organization declares: w_k = n_k.

    Args:
        cap: The most records that count, so that the largest organization does not decide alone; 0: no cap.
    """
    return float(min(update.examples, cap) if cap else update.examples)
