"""FedIT: the mean of A and the mean of B, the naive way to average adapters."""

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
    """Average A and B separately, by weight: biased, as B̄·Ā is not the mean of the products B_k·A_k.

    A baseline for comparisons. Under record-level privacy the noise on the two factors multiplies: use FFA-LoRA or `fedsvd`
    instead, with noise on B only.
    """
    return (yield from mean())
