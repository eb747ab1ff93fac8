"""What a server optimizer is: it moves the shared model by a fused delta, an optimizer on the pseudo-gradient −D."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cotune.strategies.types import Aggregate, RoundContext


class ServerOptimizer:
    """The base of all: frozen dataclasses, whose fields are the plan's parameters (Reddi et al., ICLR 2021, algorithm 1)."""

    def step(
        self, state: Mapping[str, Tensor], fused: Aggregate, memory: Mapping[str, Tensor], context: RoundContext
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(θ, D, own memory) -> (θ, own memory); the memory is tensors, checkpointed with the round."""
        raise NotImplementedError

    def serve(self, state: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model to judge and to hand out, where that is not θ itself."""
        return dict(state)
