"""An organization's own copy of all that is trained, pulled toward the shared model.

Ditto (Li et al., ICML 2021, https://arxiv.org/abs/2012.04221, algorithm 1): its steps come after those of the shared model in
every round, and the shared model never reads it: what leaves is the same to the bit, whatever the copy is. So the copy may be
trained without noise where neither it nor what it predicts leaves.

pFedMe (T. Dinh et al., NeurIPS 2020, https://arxiv.org/abs/2006.08848, algorithm 1): the copy θ takes the steps, and the shared
model w follows it, w ← w − ηλ(w − θ) after every K of them. So every step has noise, and w is what DP-SGD's released values give.
Other than in the paper, each of the K steps draws a batch of its own, which is what the accounting of samples assumes.
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


class FollowedCopy(OwnCopy):
    """The copy of a plan with `personal.method = "pfedme"`: in every round it starts as the shared model, which follows it."""

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], received: State) -> Iterator[None]:
        """During the block the model is the copy θ; afterwards the copy is taken over, and the model is w, which has followed it.

        Args:
            optimizer: Of the copy.
            parameters: That are trained, by their names.
            received: What both start from.
        """
        personal = self.plan.personal
        shared = {name: p.detach().clone() for name, p in parameters.items()}  # w
        since = 0

        @torch.no_grad()
        def follow() -> None:
            nonlocal since
            for name, p in parameters.items():
                shared[name] += personal.move * (p.detach() - shared[name])
            since = 0

        def count(*_: object) -> None:
            nonlocal since
            since += 1
            if since == personal.inner_steps:
                follow()

        def term(name: str, p: nn.Parameter) -> Tensor:
            return personal.pull * (p.detach() - shared[name])

        hook = optimizer.register_step_post_hook(count)
        try:
            with adding_to_gradients(optimizer, parameters, term):
                yield
            if since:
                follow()
            self._adopt(self.model.state(parameters))
        finally:
            hook.remove()
            self.model.load({**received, **{name: t.to("cpu", torch.float32, copy=True) for name, t in shared.items()}})


_KINDS: Mapping[str, type[PersonalParameters]] = {"parts": PersonalParameters, "ditto": OwnCopy, "pfedme": FollowedCopy}


def open_personal(plan: Plan, site: Site, model: TrainableModel, round: int, admitted: int) -> PersonalParameters:
    """Return what the plan keeps at an organization (see `PersonalParameters`)."""
    return _KINDS[plan.personal.method](plan, site, model, round, admitted)
