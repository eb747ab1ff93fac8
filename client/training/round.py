"""One round at an organization: from the state of the shared model to an update, charged to its ledger before it trains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cotune.client.site import Site
from cotune.client.training.charged_steps import TrainedRound, train_with_privacy, train_without_privacy
from cotune.client.training.checks.request_checks import BEFORE_RECORDS, BEFORE_TRAINING, BY_PUBLIC_NUMBER, run_checks
from cotune.client.training.personal.prediction_model import OwnModel
from cotune.client.training.preparation import PreparedRound, prepare_round
from cotune.client.training.request_context import RequestContext
from cotune.client.training.statistics import statistics_of
from cotune.client.training.teachers import vote_with_privacy
from cotune.errors import RunError
from cotune.models.device import explained_out_of_memory
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.config import RecordPrivacy
from cotune.protocol.codecs import round_to, rounding_generator
from cotune.strategies.types import Delta, Update, difference, find_not_finite


def train_round(
    plan: Plan,
    site: Site,
    round: int,
    state: State,
    *,
    admitted: int = 0,
    sent: Mapping[str, Tensor] | None = None,
    declarable: tuple[int, int] | None = None,
) -> Update:
    """Train one round from `state` and return the update; the same request again gets the same update, without training.

    The order is a promise: nothing reads a record before the plan is approved and allowed, what the server can see depends on the
    public number of records alone, and no record takes part in training or in what is disclosed before it is charged (see
    `client.training.checks.request_checks`).

    Args:
        plan: As received, verified.
        site: Of the organization.
        round: Which one, from 1.
        state: The shared parameters.
        admitted: The last round whose update of this organization is in the model; 0: none.
        sent: What the server sends beside the state.
        declarable: Between which numbers of records the public one has to be; None: whatever the plan takes.

    Raises:
        PolicyError: The policy does not allow the plan, or not any more.
        DataError: The organization's records cannot be used.
        PrivacyError: The budget does not suffice, or the model cannot be trained privately.
        RunError: The request is not one that the plan makes, or training failed.
        DeviceError: The GPU is full; what was charged for the round stays charged.
    """
    context = RequestContext(plan, site, site.policy(), round, state, admitted, sent or {}, declarable)
    run_checks(BEFORE_RECORDS, context)
    run_checks(BY_PUBLIC_NUMBER, context)
    finished = site.finished_update(plan.plan_id, round, context.received)
    if finished is not None:
        return finished
    run_checks(BEFORE_TRAINING, context)
    try:
        with explained_out_of_memory('ask for local.physical_batch_size = "auto" or a smaller one in the plan, or free memory'):
            prepared = prepare_round(context)
            trained, delta = _train(prepared)
        update = _build_update(prepared, trained, delta)
        _keep(prepared, update)
    finally:
        context.account.settle_unanswered()
    return update


def _train(prepared: PreparedRound) -> tuple[TrainedRound, Delta]:
    """What training gives, and what leaves of it."""
    privacy = prepared.context.plan.privacy
    if not isinstance(privacy, RecordPrivacy):
        return train_without_privacy(prepared), _what_leaves(prepared)
    if privacy.pate is not None:
        return vote_with_privacy(prepared)
    return train_with_privacy(prepared), _what_leaves(prepared)


def _build_update(prepared: PreparedRound, trained: TrainedRound, delta: Delta) -> Update:
    context = prepared.context
    model = context.model
    shared = prepared.personal.shared
    _check_finite(delta)
    delta = _round_delta(context, delta)
    return Update(
        context.site.organization,
        context.round,
        delta,
        context.examples,
        trained.steps,
        trained.epsilon,
        trained.disclosed,
        trained.noise,
        statistics_of(context.plan, model, shared, prepared.setup),
        context.received,
    )


def _what_leaves(prepared: PreparedRound) -> Delta:
    """What training changed of the shared parameters; of an own model, its predictions. Noise was added before."""
    personal = prepared.personal
    model = prepared.context.model
    if isinstance(personal, OwnModel):
        _check_finite(model.state(prepared.parameters))
        return personal.predict(prepared.context.state)
    return prepared.own_rank.trim(difference(model.state(personal.shared), prepared.received))


def _round_delta(context: RequestContext, delta: Delta) -> Delta:
    """The values that travel, from here on the only ones: what is kept, checked, logged and sent. Noise was added before.

    Repeatable, as a request that comes again is answered with the same update. Raises RunError for a value that the codec cannot
    write.
    """
    plan = context.plan
    organization = context.site.organization
    if plan.wire == "float32":  # which writes every value as it is
        return delta
    return {
        name: round_to(plan.wire, tensor, rounding_generator(plan.seed, organization, context.round, name))
        for name, tensor in delta.items()
    }


def _check_finite(delta: Delta) -> None:
    """A diverged model is not sent."""
    if find_not_finite(delta):
        raise RunError(
            "the local model is not finite any more: expected finite parameters; lower local.learning_rate",
            code="run.diverged",
        )


def _keep(prepared: PreparedRound, update: Update) -> None:
    """Keep what the next round goes on from and, last, the update: from then on the round is answered."""
    context = prepared.context
    prepared.correction.keep(context.round, context.stage, update.delta)
    prepared.personal.keep()
    context.site.store_update(update, context.plan.plan_id)
    if context.account.budget is not None:
        context.account.answered(context.round)
