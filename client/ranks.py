"""An organisation that trains a smaller rank than the plan's adapters have: the first rows of A and columns of B alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cotune.models.sharing import SharedModel, State
from cotune.plan.schema import Plan
from cotune.plan.tables import Stage
from cotune.privacy.policy import Policy
from cotune.strategies.updates import Delta


class OwnRank:
    """Of one round at one organisation. Where its rank is the plan's, nothing here does anything.

    The other slices are 0 while it trains, A and B together: they take no part in the model and get no gradient, so that they
    take nothing of a clip norm either. Noise on them is thrown away after it was added, which is post-processing.
    """

    def __init__(self, plan: Plan, stage: Stage, policy: Policy, model: SharedModel) -> None:
        self.rank = policy.training.rank_for(plan.lora.rank)
        smaller = stage.mode == "lora" and self.rank < plan.lora.rank
        self.adapters = model.adapters() if smaller else ()
        self.columns = {adapter.b for adapter in self.adapters}
        self.names = {adapter.a for adapter in self.adapters} | self.columns

    def held(self, model: SharedModel, state: State) -> State:
        """The state that it trains from; a model that is set to the received one is set to this one."""
        if not self.names:
            return state
        held = {**state, **{name: self._masked(name, tensor) for name, tensor in model.state(sorted(self.names)).items()}}
        model.load(held)
        return held

    @contextmanager
    def applied(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """During the block no step moves the slices that are not held: DP-SGD has left the noised gradient by then."""

        def mask(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name in self.names & parameters.keys():
                gradient = parameters[name].grad
                parameters[name].grad = None if gradient is None else self._masked(name, gradient)

        hook = optimizer.register_step_pre_hook(mask)
        try:
            yield
        finally:
            hook.remove()

    def sent(self, delta: Delta) -> Delta:
        """Without the slices that are not held."""
        return {name: self._slices(name, tensor).clone() if name in self.names else tensor for name, tensor in delta.items()}

    def _slices(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[:, : self.rank] if name in self.columns else tensor[: self.rank]

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        whole = torch.zeros_like(tensor)
        self._slices(name, whole).copy_(self._slices(name, tensor))
        return whole
