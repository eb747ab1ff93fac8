"""What a client term is: something added to an organization's gradients, its durable state, and the server's half of it.

Under DP-SGD the term is added after clipping and noising, to the privatized gradient: it depends on released values alone (the
model, former deltas of the organization itself), so that it is post-processing and takes nothing of the clip norm.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cotune.strategies.types import Aggregate, Delta, LocalSteps, RoundContext


class ClientTerm:
    """The base of all: frozen dataclasses, whose fields are the plan's parameters. A term overrides what it needs.

    Names of tensors are those of the parameters, in what is kept, sent and remembered; a tensor that is not there yet is 0.
    """

    def correction(
        self, name: str, parameter: Tensor, received: Tensor, kept: Tensor | None, sent: Tensor | None
    ) -> Tensor | None:
        """What is added to the gradient of a parameter in every step; None: nothing.

        received: its value at the start of the round. kept: the organization's own tensor. sent: the server's, of this round.
        """
        return None

    def keep(self, kept: Mapping[str, Tensor], delta: Delta, sent: Mapping[str, Tensor], local: LocalSteps) -> dict[str, Tensor]:
        """What the organization keeps after its round, durably; from released values only."""
        return {}

    def send(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What travels to the organizations beside the model."""
        return {}

    def fold(self, fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext) -> tuple[Delta, dict[str, Tensor]]:
        """The server's half: (D, own memory) -> (D, own memory), between the fusion and the server optimizer."""
        return fused.delta, {}
