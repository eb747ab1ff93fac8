"""What is checked before a round is trained, and in which order: the order is a promise (see `client.training.round`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cotune.client.consent.approvals import Approvals
from cotune.client.consent.policy_check import check_consent, check_number, check_plan
from cotune.client.noise_calibration import check_examples
from cotune.client.training.request_context import RequestContext
from cotune.ensembles.public_inputs import find_extreme_score
from cotune.errors import RunError
from cotune.plan.public import SCORES
from cotune.plan.trained_parameters import scores_shape, shared_names
from cotune.strategies.types import MAX_VALUE, find_extreme

Check = Callable[[RequestContext], None]


def check_round(context: RequestContext) -> None:
    """Check that the plan has the round, and that the last admitted one is before it. Raises PlanError, RunError."""
    _ = context.stage
    if not 0 <= context.admitted < context.round:
        raise RunError(
            f"the request for round {context.round} names round {context.admitted} as the last admitted one: expected an earlier"
            " one",
            code="run.wrong_round",
        )


def check_approval(context: RequestContext) -> None:
    """Check that somebody here has approved the plan. Raises PolicyError."""
    Approvals(context.site).check(context.plan, context.policy)


def check_rules(context: RequestContext) -> None:
    """Check the rules of the policy that ask nothing of the records. Raises PolicyError."""
    check_plan(context.plan, context.policy)


def check_declared_number(context: RequestContext) -> None:
    """Check a number of records that the policy declares: the server would refuse another. Raises PolicyError."""
    rules = context.policy.disclosures
    if rules.example_count == "declared" and rules.declared_examples is not None:
        check_number(context.plan, context.policy, rules.declared_examples, context.declarable)


def check_values(context: RequestContext) -> None:
    """Check that what was sent is finite, and of a size that parameters have. Raises RunError."""
    for what, tensors in (("state", context.state), ("further tensors", context.sent)):
        if extreme := find_extreme(tensors):
            name, largest = extreme
            raise RunError(
                f"the request's {what} reach {largest:.3g} in {name[:80]}: expected values of at most {MAX_VALUE:g}",
                code="run.extreme_values",
            )


def check_public_number(context: RequestContext) -> None:
    """Check the public number of records, which may be drawn and charged here. Raises PolicyError."""
    check_number(context.plan, context.policy, context.examples, context.declarable)


def check_all_rules(context: RequestContext) -> None:
    """Check all rules of the policy, by the public number of records. Raises PolicyError."""
    check_consent(context.plan, context.policy, context.examples)


def check_hours(context: RequestContext) -> None:
    """Check the hours that the plan may train, by those that it has. Raises PolicyError."""
    check_consent(context.plan, context.policy, context.examples, context.account.hours())


def check_batch(context: RequestContext) -> None:
    """Check that the records fill a batch. Raises DataError."""
    check_examples(context.examples, context.stage.local, context.site.organization)


def check_state(context: RequestContext) -> None:
    """Check that the request holds every parameter that the stage trains and shares. Raises RunError."""
    lacking = [name for name in shared_names(context.plan, context.model, context.round) if name not in context.state]
    if lacking:
        raise RunError(
            f"the request's state lacks {lacking[0]}: expected every parameter that the stage trains", code="run.wrong_state"
        )
    if context.plan.shares_predictions:
        _check_predictions(context)


def _check_predictions(context: RequestContext) -> None:
    """Fused predictions are of the plan's shape, and within the bounds of single ones. Raises RunError."""
    fused = context.state[SCORES]
    if tuple(fused.shape) != scores_shape(context.plan):
        raise RunError(
            f"the request's predictions have the shape {tuple(fused.shape)}, expected {scores_shape(context.plan)}: an answer for"
            " each public input, and a score for each class",
            code="run.wrong_state",
        )
    extreme = find_extreme_score(fused, torch.zeros_like(fused), context.plan.public)
    if extreme is not None:
        raise RunError(
            f"the request's predictions reach {extreme:.3g}: expected {context.plan.public.bound:g} at most, as of every"
            " organization",
            code="run.extreme_values",
        )


def check_sent(context: RequestContext) -> None:
    """Check that what comes beside the state is about its parameters. Raises RunError."""
    for name, tensor in context.sent.items():
        if name not in context.state or tensor.shape != context.state[name].shape:
            raise RunError(
                f"the request sends {name[:80]} {tuple(tensor.shape)} beside the state: expected a parameter of the state, in its"
                " shape",
                code="run.wrong_state",
            )


def check_unanswered(context: RequestContext) -> None:
    """Check that the round was not answered before, nor a later one. Raises PrivacyError."""
    context.account.check_unanswered(context.round)


def check_budget(context: RequestContext) -> None:
    """Check that the budget suffices for this round and those after it. Raises PolicyError, PrivacyError."""
    _ = context.noise_multiplier


# The order in which a round is checked. Each group relies on those before it:
# what refuses before the records are read cannot depend on a record, so that its refusal may be sent to the server;
BEFORE_RECORDS: tuple[Check, ...] = (check_round, check_approval, check_rules, check_declared_number, check_values)
# what refuses by their number depends on the public number alone, also for a request that was answered before;
BY_PUBLIC_NUMBER: tuple[Check, ...] = (check_public_number, check_all_rules)
# what refuses a request that is to be trained, before the model is touched;
BEFORE_TRAINING: tuple[Check, ...] = (check_hours, check_batch, check_state, check_sent)
# and last, with record-level privacy, what refuses before anything is charged.
BEFORE_CHARGE: tuple[Check, ...] = (check_unanswered, check_budget)


def run_checks(checks: tuple[Check, ...], context: RequestContext) -> None:
    """Run checks in their order; the first that fails raises."""
    for check in checks:
        check(context)
