"""The mean of A and the mean of B: the naive way with adapters."""

from __future__ import annotations

from cotune.strategies.fusions.averaging.mean import mean
from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums


@fusion(
    "fedit",
    cite="Zhang et al., ICASSP 2024, https://arxiv.org/abs/2305.05644",
    needs=Needs(by_parameter=True, adapters=("ab",)),
)
def fedit() -> Sums:
    """Weighted means of A and of B, each by itself: biased, as B̄·Ā is not the mean of the products B_k·A_k.

    A baseline to compare with. Under record-level privacy the noise on both factors multiplies; there FFA-LoRA and `fedsvd`,
    with noise on B alone, are the choice.
    """
    return (yield from mean())
