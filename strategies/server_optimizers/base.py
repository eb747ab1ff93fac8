"""The interface of server optimizers, which move the shared model by a fused delta D: optimizers on the pseudo-gradient −D."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cotune.strategies.types import Aggregate, RoundContext


class ServerOptimizer:
    """Base class: subclasses are frozen dataclasses, whose fields are the plan's parameters (Reddi et al., ICLR 2021, alg. 1)."""

    def step(
        self, state: Mapping[str, Tensor], fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Move the model by a fused delta.

        Args:
            state: θ; it must not be changed in place.
            fused: D and statistics of the round.
            memory: What this method returned as memory in the previous round; empty in the first.
            context: Of the round.

        Returns:
            (new θ, new memory). The memory consists of tensors and is part of the round's checkpoint.
        """
        raise NotImplementedError

    def serve(self, state: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model to evaluate and to send; θ itself unless a subclass says otherwise."""
        return dict(state)
