"""A round that is ready to be trained: the model holds what was received, records are encoded, and nothing is charged yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from cotune.client.training.checks.sanity_checks import SanityChecks, build_sanity_checks
from cotune.client.training.client_terms import ClientTermState
from cotune.client.training.personal.ditto_pfedme import open_personal
from cotune.client.training.personal.parameters import PersonalParameters
from cotune.client.training.personal.prediction_model import OwnModel
from cotune.client.training.rank_mask import RankMask
from cotune.client.training.regularization import Regularization
from cotune.client.training.request_context import RequestContext
from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.optimizer import build_optimizer
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.models.trainable import State
from cotune.plan.trained_parameters import held_names, trained_names


@dataclass(frozen=True)
class PreparedRound:
    """A round that is ready to be trained: the model holds what was received, and only the stage's parameters are trained."""

    context: RequestContext
    setup: TrainingSetup
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]  # those that are trained
    received: State  # what they start from
    sanity_checks: SanityChecks
    personal: PersonalParameters
    correction: ClientTermState
    own_rank: RankMask
    regularization: Regularization

    def attach_extensions(self) -> ExitStack:
        """Let what is personal, the client term, the regularization and the smaller rank take part in every step of the block."""
        with ExitStack() as stack:
            stack.enter_context(self.personal.attach(self.optimizer, self.parameters, self.received))
            stack.enter_context(self.correction.attach(self.optimizer, self.parameters))
            stack.enter_context(self.regularization.attach(self.optimizer, self.parameters))
            stack.enter_context(self.own_rank.attach(self.optimizer, self.parameters))
            return stack.pop_all()

    def narrow(self, names: Sequence[str]) -> PreparedRound:
        """Return the round as one that trains some of its parameters alone, from where they are. Set the model to that."""
        context = self.context
        parameters = context.model.train_only(names)
        before = context.model.state(names)
        return replace(
            self,
            optimizer=build_optimizer(context.stage.local, context.model, list(names), parameters),
            parameters=dict(zip(names, parameters, strict=True)),
            sanity_checks=build_sanity_checks(context, before, noise=context.account.budget is not None),
            regularization=Regularization(context, names),
        )


def _open_kept(context: RequestContext) -> PersonalParameters:
    """What the plan keeps here, with the model set to what was received; of an own model, to its base."""
    kind = OwnModel if context.plan.shares_predictions else open_personal
    context.model.load({} if context.plan.shares_predictions else context.state)
    return kind(context.plan, context.site, context.model, context.round, context.admitted)


def prepare_round(context: RequestContext) -> PreparedRound:
    """Set the model to what was received, and encode the records by its frozen part; nothing of it leaves."""
    plan = context.plan
    site = context.site
    model = context.model
    personal = _open_kept(context)
    correction = ClientTermState(plan, site, context.admitted, context.sent)
    own_rank = RankMask(plan, context.stage, context.policy, model)
    received = own_rank.mask_state(model, personal.join(context.state))
    tasks = context.account.dataset.tasks
    personal.shared = held_names(plan, personal.shared, tasks)
    names = held_names(plan, trained_names(plan, model, context.round), tasks)
    parameters = model.train_only(names)
    setup = build_setup(
        plan,
        context.stage,
        model,
        context.account.dataset,
        received if plan.shares_predictions else context.state,
        site.organization,
        expected_batch=context.expected_batch,
    )
    return PreparedRound(
        context,
        setup,
        build_optimizer(context.stage.local, model, names, parameters),
        dict(zip(names, parameters, strict=True)),
        received,
        build_sanity_checks(context, {name: received[name] for name in names}, noise=context.account.budget is not None),
        personal,
        correction,
        own_rank,
        Regularization(context, names),
    )
