"""The client half of a plan's client term: added to the gradients in every step, after clipping and noise; and what is kept of
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cotune.client.site import Site
from cotune.plan.schema import Plan
from cotune.plan.tables import Stage
from cotune.strategies.build import build_client_term
from cotune.strategies.round import LocalSteps
from cotune.strategies.updates import Delta


class Correction:
    """Of one round at one organisation. admitted: the last round whose update of it is in the model; 0: none.

    What is kept belongs to that round: were it of a later one, whose update never entered the model, client and server would
    count on different things. Raises RunError when it is lost.
    """

    def __init__(self, plan: Plan, site: Site, admitted: int, sent: Mapping[str, Tensor]) -> None:
        self.plan, self.site, self.admitted, self.sent = plan, site, admitted, sent
        self.term = build_client_term(plan.strategy)
        keeps = plan.strategy.keeps_state
        self.kept = site.recall(plan.plan_id, admitted) if keeps and admitted else {}

    @contextmanager
    def applied(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """During the block every step of the optimiser sees gradient + term: DP-SGD has left the noised gradient by then."""
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
