"""An organization's own copy of all that is trained, pulled toward the shared model (Li et al., "Ditto", ICML 2021,
https://arxiv.org/abs/2012.04221, algorithm 1).

Its steps come after those of the shared model in every round, and the shared model never reads it: what leaves is the same to the
bit, whatever the copy is. So the copy may be trained without noise where neither it nor what it predicts leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cotune.client.site import Site
from cotune.client.training.extensions import adding_to_gradients
from cotune.client.training.personal import PERSONAL, PersonalParameters
from cotune.models.trainable import State, TrainableModel
from cotune.plan.parameters import trained_names
from cotune.plan.schema import Plan
from cotune.strategies.types import find_not_finite

_log = logging.getLogger(__name__)


class OwnCopy(PersonalParameters):
    """The copy of a plan with `personal.method = "ditto"`; kept and tied to rounds as personal parts are."""

    def join(self, state: State) -> State:
        """Return what the shared model trains from: the received state as it came."""
        return state

    @contextmanager
    def in_place(self, received: State) -> Iterator[Mapping[str, nn.Parameter]]:
        """During the block the model is the copy, and its trained parameters are given; afterwards the shared model as it was.

        Args:
            received: What the shared model was trained from in this round: the copy starts there where nothing was kept.
        """
        names = trained_names(self.plan, self.model, self.round)
        shared = {**received, **self.model.state(names)}
        self.model.load({**received, **self.kept})
        try:
            yield dict(zip(names, self.model.train_only(names), strict=True))
            self._adopt(self.model.state(names))
        finally:
            self.model.load(shared)

    def _adopt(self, trained: State) -> None:
        """A copy that diverged is dropped, and no failure is told: without noise, whether it did follows from single records."""
        if find_not_finite(trained):
            _log.warning("the own copy diverged in round %d and stays as it was: lower local.learning_rate", self.round)
        else:
            self.kept = {**self.kept, **trained}

    @contextmanager
    def pull(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], received: State) -> Iterator[None]:
        """During the block, add λ(v − w) to the gradient of every step, after its noise: w is what came, a released value."""
        toward = {name: received[name].to(p.device, p.dtype) for name, p in parameters.items()}

        def term(name: str, p: nn.Parameter) -> Tensor:
            return self.plan.personal.pull * (p.detach() - toward[name])

        with adding_to_gradients(optimizer, parameters, term):
            yield

    def keep(self) -> None:
        """Keep the copy after training, before the update is finished."""
        self.site.remember(self.plan.plan_id, self.round, self.kept, PERSONAL, since=self.admitted)


def open_personal(plan: Plan, site: Site, model: TrainableModel, round: int, admitted: int) -> PersonalParameters:
    """Return what the plan keeps at an organization (see `PersonalParameters`)."""
    kind = OwnCopy if plan.personal.keeps_copy else PersonalParameters
    return kind(plan, site, model, round, admitted)
