"""DARE: the weighted mean of updates with randomly dropped and rescaled entries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.registry import Needs, fusion
from cotune.strategies.sums import Sums, weighted, weighted_mean
from cotune.strategies.types import RoundContext, WeightedUpdate


@fusion(
    "dare",
    cite="Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099",
    needs=Needs(by_parameter=True, mixed_ranks=True),
    idempotent=False,
)
def dare(*, drop: Annotated[float, Field(ge=0, lt=1)] = 0.5, context: RoundContext) -> Sums:
    """Drop random entries and rescale the rest, D = Σ p_k m_k ⊙ Δ_k / (1 − p), so that E[D] is the weighted mean.

    The masks m_k are drawn from the plan's seed, the round and the organization's name.

    Args:
        drop: p, the probability that an entry is dropped.
    """

    def contribution(update: WeightedUpdate) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(_seed(context, update.update.organization))
        return weighted(update, {name: _thinned(update.delta[name], drop, generator) for name in sorted(update.delta)})

    return weighted_mean((yield contribution))


def _thinned(tensor: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) >= drop
    return tensor * kept / (1 - drop)


def _seed(context: RoundContext, organization: str) -> int:
    """Return a seed of 32 bits, which is what torch's generator uses."""
    text = f"dare\x1f{context.seed}\x1f{context.round}\x1f{organization}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
