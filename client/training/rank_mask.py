"""Train adapters of a smaller rank than the plan's, where an organization's policy limits the rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cotune.client.training.gradient_hooks import before_steps
from cotune.models.trainable import State, TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy
from cotune.strategies.types import Delta


class RankMask:
    """Adapters of a smaller rank than the plan's: the first rows of A and columns of B alone. Does nothing at the plan's rank.

    The other slices are 0 during training, in A and B together: they take no part in the model and get no gradient, so that they
    take nothing of the clip norm either. Noise on them is discarded after it was added, which is post-processing.
    """

    def __init__(self, plan: Plan, stage: Stage, policy: Policy, model: TrainableModel) -> None:
        self.rank = policy.training.rank_for(plan.lora.rank)
        smaller = stage.mode == "lora" and self.rank < plan.lora.rank
        self.adapters = model.adapters() if smaller else ()
        self.columns = {adapter.b for adapter in self.adapters}
        self.names = {adapter.a for adapter in self.adapters} | self.columns

    def mask_state(self, model: TrainableModel, state: State) -> State:
        """Return the state with the other slices set to 0, and set the model to it."""
        if not self.names:
            return state
        held = {**state, **{name: self._masked(name, tensor) for name, tensor in model.state(sorted(self.names)).items()}}
        model.load(held)
        return held

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """During the block, set the gradient of the other slices to 0 before every step, after DP-SGD has added its noise."""

        def mask() -> None:
            for name in self.names & parameters.keys():
                gradient = parameters[name].grad
                parameters[name].grad = None if gradient is None else self._masked(name, gradient)

        with before_steps(optimizer, mask):
            yield

    def trim(self, delta: Delta) -> Delta:
        """Return a delta without the other slices."""
        return {name: self._slices(name, tensor).clone() if name in self.names else tensor for name, tensor in delta.items()}

    def _slices(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[:, : self.rank] if name in self.columns else tensor[: self.rank]

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        whole = torch.zeros_like(tensor)
        self._slices(name, whole).copy_(self._slices(name, tensor))
        return whole
