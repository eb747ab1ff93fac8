"""The client term of a plan's strategy at an organization (FedProx, FedDyn, SCAFFOLD): added to gradients, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cotune.client.site import Site
from cotune.client.training.gradient_hooks import adding_to_gradients
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.strategies.aggregator import build_client_term
from cotune.strategies.types import Delta, LocalSteps


class ClientTermState:
    """The client term of a plan's strategy in one round: added to gradients, with state that is kept from round to round.

    What is kept belongs to the last admitted round: were it of a later one, whose update never entered the model, client and
    server would rely on different states.

    Args:
        admitted: The last round whose update of this organization is in the model; 0: none.
        sent: What the server sends beside the state.

    Raises:
        RunError: What was kept is lost.
    """

    def __init__(self, plan: Plan, site: Site, admitted: int, sent: Mapping[str, Tensor]) -> None:
        self.plan = plan
        self.site = site
        self.admitted = admitted
        self.sent = sent
        self.term = build_client_term(plan.strategy)
        keeps = plan.strategy.keeps_state
        self.kept = site.load_state(plan.plan_id, admitted) if keeps and admitted else {}

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """During the block, add the term to the gradient before every step: under DP-SGD, to the gradient that has its noise."""
        if self.plan.strategy.client_term is None:
            yield
            return
        received = {name: p.detach().clone() for name, p in parameters.items()}
        kept, sent = (_on({n: t for n, t in held.items() if n in parameters}, parameters) for held in (self.kept, self.sent))

        def term(name: str, p: nn.Parameter) -> Tensor | None:
            return self.term.correction(name, p.detach(), received[name], kept.get(name), sent.get(name))

        with adding_to_gradients(optimizer, parameters, term):
            yield

    def keep(self, round: int, stage: Stage, delta: Delta) -> None:
        """Keep the term's state after training, before the update is finished.

        Args:
            round: Number of the round, from 1.
            stage: That the round is in.
            delta: As it leaves the organization, clipped and noised.
        """
        if self.plan.strategy.keeps_state:
            assert stage.local.steps is not None, "a plan whose term keeps state gives steps"
            local = LocalSteps(stage.local.learning_rate, stage.local.momentum, stage.local.steps)
            kept = {**self.kept, **self.term.keep(self.kept, delta, self.sent, local)}
            self.site.store_state(self.plan.plan_id, round, kept, since=self.admitted)


def _on(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: tensor.to(parameters[name].device, parameters[name].dtype) for name, tensor in tensors.items()}
