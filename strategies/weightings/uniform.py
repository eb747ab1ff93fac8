"""Equal weights."""

from __future__ import annotations

from cotune.strategies.registry import weighting
from cotune.strategies.types import Update


@weighting("uniform", cite="Li et al., ICLR 2020, https://arxiv.org/abs/1907.02189, scheme II")
def uniform(update: Update) -> float:
    """Weight all organizations equally: w_k = 1."""
    return 1.0
