"""SCAFFOLD: control variates that correct each organization's steps for how its gradients differ from the average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cotune.strategies.client_terms.base import ClientTerm
from cotune.strategies.registry import Needs, client_term
from cotune.strategies.types import Aggregate, Delta, LocalSteps, RoundContext


@client_term(
    "scaffold",
    cite="Karimireddy et al., ICML 2020, https://arxiv.org/abs/1910.06378, algorithm 1, option II",
    needs=Needs(
        receives=True,
        client_state=True,
        participation=0.1,
        optimizers=("sgd",),
        momentum=False,
        client_privacy="its control variate would follow a clipped and noised mean, and those of the organizations true deltas",
    ),
)
@dataclass(frozen=True)
class Scaffold(ClientTerm):
    """Train with gradient − c_k + c and c_k⁺ = c_k − c − Δ_k/(Kη), with control variates c_k of the organization and c of all.

    As c_k⁺ − c_k = −c − Δ_k/(Kη), the server computes c ← (1 − f)c − f·D/(Kη) from D alone, where f is the fraction of the
    organizations that took part; organizations send nothing but Δ_k. So c is the mean of all c_k: for any fixed weights under
    full participation, for equal weights otherwise. torch adds weight decay to the corrected gradient; for SGD the order does not
    matter, and the variates are gradients of the loss with its decay.
    """

    def correction(
        self, name: str, parameter: Tensor, received: Tensor, kept: Tensor | None, sent: Tensor | None
    ) -> Tensor | None:
        """Return c − c_k."""
        if kept is None:
            return sent
        return -kept if sent is None else sent - kept

    def keep(self, kept: Mapping[str, Tensor], delta: Delta, sent: Mapping[str, Tensor], local: LocalSteps) -> dict[str, Tensor]:
        """Return c_k ← c_k − c − Δ_k/(Kη), in float64."""
        scale = 1 / (local.steps * local.learning_rate)
        return {name: _of(kept, name) - _of(sent, name) - d.to(torch.float64) * scale for name, d in delta.items()}

    def send(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return c in float32."""
        return {name: c.to(torch.float32) for name, c in memory.items()}

    def fold(self, fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext) -> tuple[Delta, dict[str, Tensor]]:
        """Return (D, c) with c ← (1 − f)c − f·D/(Kη), in float64."""
        fraction = fused.participants / context.organizations
        scale = fraction / (context.local.steps * context.local.learning_rate)
        moved = {name: (1 - fraction) * _of(memory, name) - d.to(torch.float64) * scale for name, d in fused.delta.items()}
        return fused.delta, {**memory, **moved}


def _of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor in float64; 0 if it is missing."""
    return tensors[name].to(torch.float64) if name in tensors else torch.zeros((), dtype=torch.float64)
