"""FedProx: a proximal term that pulls local training towards the received model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from cotune.strategies.client_terms.base import ClientTerm
from cotune.strategies.registry import client_term


@client_term("proximal", cite="Li et al., MLSys 2020, https://arxiv.org/abs/1812.06127 (FedProx)")
@dataclass(frozen=True)
class Proximal(ClientTerm):
    """Train with gradient + μ(θ_k − θ), so that organizations with unlike records drift less from the received model θ.

    Args:
        mu: μ, per step; local.learning_rate · mu must stay below 2, or the proximal term itself diverges.
    """

    mu: Annotated[float, Field(gt=0, le=1e3)] = 0.01

    def correction(
        self, name: str, parameter: Tensor, received: Tensor, kept: Tensor | None, sent: Tensor | None
    ) -> Tensor | None:
        """Return μ(θ_k − θ)."""
        return self.mu * (parameter - received)
