"""The interface of client terms: a correction of an organization's gradients, its durable state, and the server's part.

Under DP-SGD the correction is added to the gradient after clipping and noising. It depends only on released values (the model
and the organization's own former deltas), so it is post-processing and uses up none of the clip norm.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cotune.strategies.types import Aggregate, Delta, LocalSteps, RoundContext


class ClientTerm:
    """Base class: subclasses are frozen dataclasses, whose fields are the plan's parameters, and override what they need.

    All three kinds of state are keyed by parameter name, and a missing tensor means 0: `kept` is stored by the organization,
    `sent` is broadcast with the model, and `memory` is stored by the server.
    """

    def correction(
        self, name: str, parameter: Tensor, received: Tensor, kept: Tensor | None, sent: Tensor | None
    ) -> Tensor | None:
        """Return what to add to the gradient of a parameter in each local step.

        Args:
            name: Of the parameter.
            parameter: Its current value θ_k.
            received: Its value θ at the start of the round.
            kept: The organization's stored tensor; None before its first round.
            sent: The tensor that the server sent for this round; None if it sent none.

        Returns:
            A tensor of the parameter's shape, type and device; None to add nothing.
        """
        return None

    def keep(self, kept: Mapping[str, Tensor], delta: Delta, sent: Mapping[str, Tensor], local: LocalSteps) -> dict[str, Tensor]:
        """Return what the organization stores durably after a round, computed from released values only.

        Args:
            kept: What it stored after its previous round.
            delta: Δ_k as it leaves the organization, clipped and noised.
            sent: What the server sent for this round.
            local: Learning rate and number of steps of the round.

        Returns:
            The tensors that replace `kept`.
        """
        return {}

    def send(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the server sends to organizations beside the model, computed from its `memory`."""
        return {}

    def fold(self, fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext) -> tuple[Delta, dict[str, Tensor]]:
        """Apply the server's part, between the fusion and the server optimizer.

        Args:
            fused: The fused delta D and the number of participants.
            memory: What the term returned as memory after the previous round.
            context: Of the round.

        Returns:
            (the delta for the server optimizer, new memory).
        """
        return fused.delta, {}
