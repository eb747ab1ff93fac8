"""Limit what a request may contain, by the plan and the local model, before any of its arrays is assembled or loaded.

The server is not trusted: a request may be larger than its plan requires, and its state may name parameters that no round has
trained, which would replace the base model that the organization has approved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache

from flwr.app import Message, MessageType

from cotune.client.consent.approvals import Approvals
from cotune.client.consent.policy_check import check_base_model, check_plan
from cotune.client.node.requests import verify_request
from cotune.client.site import Site
from cotune.client.site_setup import load_site_model
from cotune.errors import CotuneError, RunError
from cotune.flower.chunks import ChunkedMessage
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.plan.trained_parameters import scores_shape, state_shapes, student_shapes
from cotune.privacy.policy import Policy
from cotune.protocol.arrays import ARRAY_HEAD
from cotune.protocol.messages import Request, decode_header
from cotune.protocol.signatures import SIGNED

Consent = Callable[[Plan, Policy], None]  # raises PolicyError
Shapes = Mapping[str, tuple[int, ...]]


def read_plan(request: Request) -> Plan:
    """Read the plan of a request.

    Raises:
        PlanError: If it is not a valid plan.
        RunError: If it is not JSON, not valid Unicode (which has no hash), or its canonical form gives another plan when it is
            read again, as from the file in which it awaits approval.
    """
    try:
        return _parse(request.plan)
    except UnicodeEncodeError:
        raise RunError("the plan holds half a character: expected Unicode text", code="run.unreadable_plan") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"the plan cannot be read ({type(error).__name__}): expected JSON", code="run.unreadable_plan") from None


@lru_cache(maxsize=4)
def _parse(text: str) -> Plan:
    """Parse a plan; cached, as every request of a run has the same one."""
    plan = parse_plan(json.loads(text))
    plan.canonical().encode()
    if parse_plan(json.loads(plan.canonical())) != plan:
        raise RunError(
            "the plan is another one when it is read again: expected the canonical form of one plan",
            code="run.ambiguous_plan",
        )
    return plan


def expected_shapes(plan: Plan, site: Site, round: int, check: Consent, *, finished: bool = False) -> dict[str, tuple[int, ...]]:
    """Return what the state of a request may contain; see `plan.trained_parameters.state_shapes`.

    No record is read, and no model is loaded before the plan is approved and the policy allows it.

    Args:
        plan: Of the request.
        site: Of the organization.
        round: Of the request.
        check: Raises PolicyError if the policy does not allow the plan.
        finished: Whether the request delivers the final model, which consists of parameters even if rounds share predictions.

    Returns:
        Parameter -> shape.

    Raises:
        PolicyError: If the plan is not approved, or not allowed.
        ModelError: If the base model is not found on this machine.
        RunError: If the plan does not have the round.
    """
    policy = site.policy()
    Approvals(site).check(plan, policy)
    check(plan, policy)
    if not 1 <= round <= plan.rounds:
        raise RunError(
            f"received a request for round {round}: expected one of the plan's {plan.rounds} rounds", code="run.wrong_round"
        )
    if plan.shares_predictions and not finished:
        return {SCORES: scores_shape(plan)}
    shapes = student_shapes if plan.shares_predictions else state_shapes
    return shapes(plan, load_site_model(plan, site), round)


def check_received(request: Request, plan: Plan, expected: Shapes) -> None:
    """Check the names and shapes of a request's state, before anything is charged.

    Args:
        request: The request.
        plan: Of the request.
        expected: From `expected_shapes`.

    Raises:
        RunError: If the state contains anything that no round so far has trained.
    """
    for name, tensor in request.state.items():
        if name not in expected:
            raise RunError(
                f"the request's state holds {name[:80]}, which no round up to {request.round} trains: expected those parameters"
                " alone, and the approved base model for the rest",
                code="run.wrong_state",
            )
        if tuple(tensor.shape) != expected[name]:
            raise RunError(
                f"the request's {name[:80]} has the shape {tuple(tensor.shape)}, expected {expected[name]}",
                code="run.wrong_state",
            )
    if request.sent and plan.strategy.client_term is None:
        raise RunError(
            "the request sends tensors beside the state: expected none, as the plan has no client term", code="run.wrong_state"
        )


def read_message(parcel: ChunkedMessage, site: Site) -> Message:
    """Assemble the message of a request, if it is no larger than its plan requires.

    A message that is not signed, or whose plan is not approved or not readable, is assembled without its arrays; the app refuses
    it for the same reason.

    Args:
        parcel: The pieces of the message.
        site: Of the organization.

    Raises:
        TooLarge: If the message is larger than its plan requires.
        Malformed: If it is not a message.
    """
    header = parcel.header("request", SIGNED)
    if not header.has_content():
        return header
    try:
        unsigned = header.content if site.file.simulated else verify_request(header.content, site.folder)[0]
        request = decode_header(unsigned)
        plan = read_plan(request)
        finished = header.metadata.message_type != MessageType.TRAIN
        expected = expected_shapes(plan, site, request.round, check_base_model if finished else check_plan, finished=finished)
    except CotuneError:
        return header
    arrays = sum(4 * math.prod(shape) + ARRAY_HEAD for shape in expected.values())
    return parcel.message(arrays if plan.strategy.client_term is None else 2 * arrays)
