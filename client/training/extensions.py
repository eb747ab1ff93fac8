"""What a plan adds to plain training: client terms, parameters that stay with the organization, and smaller ranks.

What an organization trains and keeps to itself: its own part of the model, durable from round to round.

An organization that trains a smaller rank than the plan's adapters have: the first rows of A and columns of B alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cotune.client.site import Site
from cotune.models.trainable import State, TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.parameters import shared_names, trained_names
from cotune.plan.schema import Plan
from cotune.privacy.policy import Policy
from cotune.strategies.aggregator import build_client_term
from cotune.strategies.types import Delta, LocalSteps


class ClientTermState:
    """Of one round at one organization. admitted: the last round whose update of it is in the model; 0: none.

    What is kept belongs to that round: were it of a later one, whose update never entered the model, client and server would
    count on different things. Raises RunError when it is lost.
    """

    def __init__(self, plan: Plan, site: Site, admitted: int, sent: Mapping[str, Tensor]) -> None:
        self.plan = plan
        self.site = site
        self.admitted = admitted
        self.sent = sent
        self.term = build_client_term(plan.strategy)
        keeps = plan.strategy.keeps_state
        self.kept = site.recall(plan.plan_id, admitted) if keeps and admitted else {}

    @contextmanager
    def applied(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """During the block every step of the optimizer sees gradient + term: DP-SGD has left the noised gradient by then."""
        if self.plan.strategy.client_term is None:
            yield
            return
        received = {name: p.detach().clone() for name, p in parameters.items()}
        kept, sent = (_on({n: t for n, t in held.items() if n in parameters}, parameters) for held in (self.kept, self.sent))

        @torch.no_grad()
        def add(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, p in parameters.items():
                more = self.term.correction(name, p.detach(), received[name], kept.get(name), sent.get(name))
                if more is not None:
                    p.grad = more if p.grad is None else p.grad + more

        hook = optimizer.register_step_pre_hook(add)
        try:
            yield
        finally:
            hook.remove()

    def keep(self, round: int, stage: Stage, delta: Delta) -> None:
        """After training, before the update is handed over."""
        if self.plan.strategy.keeps_state:
            assert stage.local.steps is not None, "a plan whose term keeps state gives steps"
            local = LocalSteps(stage.local.learning_rate, stage.local.momentum, stage.local.steps)
            kept = {**self.kept, **self.term.keep(self.kept, delta, self.sent, local)}
            self.site.remember(self.plan.plan_id, round, kept, since=self.admitted)


def _on(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: tensor.to(parameters[name].device, parameters[name].dtype) for name, tensor in tensors.items()}


PERSONAL = "personal"  # the folder of what is kept


class PersonalParameters:
    """Of one round at one organization. Where the plan shares all that is trained, nothing here does anything.

    admitted: the last round whose update of it is in the model; 0: none, and the personal part starts as the base model has it.
    What is kept belongs to that round, as the shared part that it was trained with does. Raises RunError when it is lost.
    """

    def __init__(self, plan: Plan, site: Site, model: TrainableModel, round: int, admitted: int) -> None:
        self.plan = plan
        self.site = site
        self.model = model
        self.round = round
        self.admitted = admitted
        self.shared = shared_names(plan, model, round)
        self.names = [name for name in trained_names(plan, model, round) if name not in set(self.shared)]
        self.kept = site.recall(plan.plan_id, admitted, PERSONAL) if self.names and admitted else {}

    def joined(self, state: State) -> State:
        """The state with the own part beside it; a model that is set to the received one is set to this one."""
        if not self.names:
            return state
        joined = {**state, **self.model.state(self.names), **self.kept}
        self.model.load(joined)
        return joined

    def keep(self) -> None:
        """After training, before the update is handed over."""
        if self.names:
            own = self.model.state(self.names)
            self.site.remember(self.plan.plan_id, self.round, own, PERSONAL, since=self.admitted)


class RankMask:
    """Of one round at one organization. Where its rank is the plan's, nothing here does anything.

    The other slices are 0 while it trains, A and B together: they take no part in the model and get no gradient, so that they
    take nothing of a clip norm either. Noise on them is thrown away after it was added, which is post-processing.
    """

    def __init__(self, plan: Plan, stage: Stage, policy: Policy, model: TrainableModel) -> None:
        self.rank = policy.training.rank_for(plan.lora.rank)
        smaller = stage.mode == "lora" and self.rank < plan.lora.rank
        self.adapters = model.adapters() if smaller else ()
        self.columns = {adapter.b for adapter in self.adapters}
        self.names = {adapter.a for adapter in self.adapters} | self.columns

    def held(self, model: TrainableModel, state: State) -> State:
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
