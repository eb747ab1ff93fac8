"""Control variates: every organization's steps are corrected by how its gradients differ from everybody's."""

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
    """Gradient − c_k + c, with c_k⁺ = c_k − c − Δ_k/(Kη): the variates of the organization and of everybody.

    As c_k⁺ − c_k = −c − Δ_k/(Kη), the server finds c ← (1 − f)c − f·D/(Kη) from D alone, f being the fraction of the
    organizations that took part: nothing travels back but Δ_k. So c is the mean of all c_k: under full participation with any
    fixed weights, else with equal ones. torch adds weight decay to the corrected gradient, which for SGD is the same in any
    order: the variates are gradients of the loss with its decay.
    """

    def correction(
        self, name: str, parameter: Tensor, received: Tensor, kept: Tensor | None, sent: Tensor | None
    ) -> Tensor | None:
        if kept is None:
            return sent
        return -kept if sent is None else sent - kept

    def keep(self, kept: Mapping[str, Tensor], delta: Delta, sent: Mapping[str, Tensor], local: LocalSteps) -> dict[str, Tensor]:
        scale = 1 / (local.steps * local.learning_rate)
        return {name: _of(kept, name) - _of(sent, name) - d.to(torch.float64) * scale for name, d in delta.items()}

    def send(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: c.to(torch.float32) for name, c in memory.items()}

    def fold(self, fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext) -> tuple[Delta, dict[str, Tensor]]:
        fraction = fused.participants / context.organizations
        scale = fraction / (context.local.steps * context.local.learning_rate)
        moved = {name: (1 - fraction) * _of(memory, name) - d.to(torch.float64) * scale for name, d in fused.delta.items()}
        return fused.delta, {**memory, **moved}


def _of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """In float64; one that is not there yet is 0."""
    return tensors[name].to(torch.float64) if name in tensors else torch.zeros((), dtype=torch.float64)
