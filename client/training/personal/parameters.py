"""The parameters that an organization trains and keeps to itself, durably, from round to round.

What is kept belongs to the last admitted round, as the shared part that it was trained with does. On top of the shared state it
makes the organization's own model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from cotune.client.site import Site
from cotune.errors import RunError
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import personal_names, shared_names, trained_names
from cotune.strategies.types import find_not_finite

PERSONAL = "personal"  # the folder of what is kept
UNNOISED = (
    "A copy that one organization has trained on its own records, without noise. No ε bounds what it reveals of them: keep it and"
    " what it predicts where the records are."
)


class PersonalParameters:
    """The parameters that are trained and stay with the organization; none where the plan shares all that is trained.

    Args:
        round: The round that is trained; of a finished model its last one.
        admitted: The last round whose update of this organization is in the model; 0: none, and the personal parameters start as
            in the base model.

    Raises:
        RunError: What was kept is lost, or is not what the plan keeps (`run.lost_state`).
    """

    def __init__(self, plan: Plan, site: Site, model: TrainableModel, round: int, admitted: int) -> None:
        self.plan = plan
        self.site = site
        self.model = model
        self.round = round
        self.admitted = admitted
        self.shared = shared_names(plan, model, round)
        self.names = personal_names(plan, model, round)
        self.kept = site.load_state(plan.plan_id, admitted, PERSONAL) if self.names and admitted else {}
        self._check_kept()

    def join(self, state: State) -> State:
        """Return what a round trains from: the received state with the personal parameters. Set the model to it."""
        return self.own_model(state)

    def own_model(self, state: State) -> State:
        """Return the organization's own model: a shared state with the personal parameters. Set the model to it."""
        if not self.names:
            return state
        joined = {**state, **self.model.state(self._trained()), **self.kept}
        self.model.load(joined)
        return joined

    def own_first(self, trained: Sequence[str]) -> list[str]:
        """Return those of the trained parameters that a round trains alone, before the others; none without that order."""
        if self.plan.personal.order != "own_first":
            return []
        own = set(self.names)
        return [name for name in trained if name in own]

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], received: State) -> Iterator[None]:
        """During the block, let the method take part in every step of the shared parameters; parts that stay here do not.

        Args:
            optimizer: Whose steps they are.
            parameters: That are trained, by their names.
            received: The shared state as the server has sent it.
        """
        yield

    def keep(self) -> None:
        """Keep the personal parameters after training, before the update is finished."""
        if self.names:
            own = {**self.kept, **self.model.state(self._trained())}
            self.site.store_state(self.plan.plan_id, self.round, own, PERSONAL, since=self.admitted)

    def _trained(self) -> list[str]:
        """Those that this round trains: others are kept as they are."""
        now = set(trained_names(self.plan, self.model, self.round)) - set(self.shared)
        return [name for name in self.names if name in now]

    def _check_kept(self) -> None:
        """Whatever stands in the file, nothing but personal parameters takes the place of a shared one."""
        own = dict(self.model.parameters())
        wrong = [name for name, tensor in self.kept.items() if name not in self.names or tensor.shape != own[name].shape]
        if problem := next(iter(wrong), None) or find_not_finite(self.kept):
            raise RunError(
                f"what was kept after round {self.admitted} is not what this plan keeps: {problem[:80]} is no personal parameter,"
                " or of another shape, or not finite; restore the site from a backup, or start a new run",
                code="run.lost_state",
            )
