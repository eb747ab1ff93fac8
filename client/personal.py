"""What an organisation trains and keeps to itself: its own part of the model, durable from round to round."""

from __future__ import annotations

from cotune.client.site import Site
from cotune.models.sharing import SharedModel, State
from cotune.plan.model import shared_names, trained_names
from cotune.plan.schema import Plan

PERSONAL = "personal"  # the folder of what is kept


class Personal:
    """Of one round at one organisation. Where the plan shares all that is trained, nothing here does anything.

    admitted: the last round whose update of it is in the model; 0: none, and the personal part starts as the base model has it.
    What is kept belongs to that round, as the shared part that it was trained with does. Raises RunError when it is lost.
    """

    def __init__(self, plan: Plan, site: Site, model: SharedModel, round: int, admitted: int) -> None:
        self.plan, self.site, self.model, self.round, self.admitted = plan, site, model, round, admitted
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
