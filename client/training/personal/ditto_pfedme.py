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
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from cotune.client.site import Site
from cotune.client.training.gradient_hooks import adding_to_gradients
from cotune.client.training.personal.parameters import PERSONAL, PersonalParameters
from cotune.models.trainable import State, TrainableModel
from cotune.plan.personal import PersonalConfig
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import trained_names
from cotune.strategies.types import find_not_finite

_log = logging.getLogger(__name__)


class OwnCopy(PersonalParameters):
    """The copy of a plan with `personal.method = "ditto"`; kept and tied to rounds as personal parts are."""

    def join(self, state: State) -> State:
        """Return what the shared model trains from: the received state unchanged."""
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
        """Drop a copy that diverged without reporting a failure: without noise, whether it diverges depends on single records."""
        if find_not_finite(trained):
            _log.warning("the own copy diverged in round %d and stays as it was: lower local.learning_rate", self.round)
        else:
            self.kept = {**self.kept, **trained}

    def pull(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], received: State
    ) -> AbstractContextManager[None]:
        """During the block, add λ(v − w) to the gradient of every step, after its noise (algorithm 1).

        Args:
            optimizer: Of the copy.
            parameters: v, by their names.
            received: w, the shared model as it was received: a released value.
        """
        toward = {name: received[name].to(p.device, p.dtype) for name, p in parameters.items()}
        return pulled(optimizer, parameters, toward, self.plan.personal.pull)

    def keep(self) -> None:
        """Keep the copy after training, before the update is finished."""
        self.site.store_state(self.plan.plan_id, self.round, self.kept, PERSONAL, since=self.admitted)


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
        shared = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            with followed(optimizer, parameters, shared, self.plan.personal):
                yield
            self._adopt(self.model.state(parameters))
        finally:
            self.model.load({**received, **{name: t.to("cpu", torch.float32, copy=True) for name, t in shared.items()}})


def pulled(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    toward: Mapping[str, Tensor],
    strength: float,
) -> AbstractContextManager[None]:
    """During the block, add strength · (v − toward) to the gradient of every step, after its noise.

    Args:
        optimizer: Whose steps they are.
        parameters: v, by their names.
        toward: The same names -> a tensor of the parameter's shape, type and device.
        strength: λ, per unit of distance.
    """
    return adding_to_gradients(optimizer, parameters, lambda name, p: strength * (p.detach() - toward[name]))


@contextmanager
def followed(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    shared: dict[str, Tensor],
    personal: PersonalConfig,
) -> Iterator[None]:
    """During the block, parameters are the copy θ of pFedMe: pulled toward w, which follows.

    Args:
        optimizer: Of the copy.
        parameters: θ.
        shared: w, which is changed.
        personal: How often it moves, and how far.
    """
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

    hook = optimizer.register_step_post_hook(count)
    try:
        with pulled(optimizer, parameters, shared, personal.pull):
            yield
        if since:
            follow()
    finally:
        hook.remove()


_KINDS: Mapping[str, type[PersonalParameters]] = {"parts": PersonalParameters, "ditto": OwnCopy, "pfedme": FollowedCopy}


def open_personal(plan: Plan, site: Site, model: TrainableModel, round: int, admitted: int) -> PersonalParameters:
    """Return what the plan keeps at an organization, as its `personal.method` says.

    Args:
        plan: Its `personal` table decides what is kept.
        site: Where it is kept.
        model: Of the plan.
        round: Number of the round, from 1.
        admitted: The last round whose update of this organization is in the model; 0: none.

    Raises:
        RunError: What was kept is lost.
    """
    return _KINDS[plan.personal.method](plan, site, model, round, admitted)
