"""FedDyn: dynamic regularization, which aligns the optima of the organizations' objectives with the global one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies.client_terms.base import ClientTerm
from cotune.strategies.registry import Needs, client_term
from cotune.strategies.types import Aggregate, Delta, LocalSteps, RoundContext


@client_term(
    "feddyn",
    cite="Acar et al., ICLR 2021, https://arxiv.org/abs/2111.04263, algorithm 1",
    needs=Needs(
        client_state=True,
        participation=0.1,
        sets_state=True,
        client_privacy="its server half would follow a clipped and noised mean, and the organizations their true deltas",
    ),
)
@dataclass(frozen=True)
class FedDyn(ClientTerm):
    """Train with gradient − λ_k + α(θ_k − θ) and λ_k ← λ_k − αΔ_k; the server keeps h ← h − αfD and moves by D − h/α.

    f is the fraction of the organizations that took part, so that h is the mean of all λ_k: for any fixed weights under full
    participation, for equal weights otherwise.

    Args:
        alpha: α, per step; local.learning_rate · alpha must stay below 2. The smaller it is, the larger are the server's steps
            h/α.
    """

    alpha: Annotated[float, Field(gt=0, le=1e3)] = 0.1

    def correction(
        self, name: str, parameter: Tensor, received: Tensor, kept: Tensor | None, sent: Tensor | None
    ) -> Tensor | None:
        """Return α(θ_k − θ) − λ_k."""
        pull = self.alpha * (parameter - received)
        return pull if kept is None else pull - kept

    def keep(self, kept: Mapping[str, Tensor], delta: Delta, sent: Mapping[str, Tensor], local: LocalSteps) -> dict[str, Tensor]:
        """Return λ_k ← λ_k − αΔ_k, in float64."""
        return {name: self._moved(kept.get(name), d, 1.0) for name, d in delta.items()}

    def fold(self, fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext) -> tuple[Delta, dict[str, Tensor]]:
        """Return (D − h/α, h) with h ← h − αfD, in float64."""
        fraction = fused.participants / context.organizations
        h = {name: self._moved(memory.get(name), d, fraction) for name, d in fused.delta.items()}
        return {name: d.to(torch.float64) - h[name] / self.alpha for name, d in fused.delta.items()}, {**memory, **h}

    def _moved(self, before: Tensor | None, delta: Tensor, fraction: float) -> Tensor:
        step = self.alpha * fraction * delta.to(torch.float64)
        return -step if before is None else before - step
