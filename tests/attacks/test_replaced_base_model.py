"""A server that sends encoder weights in the state of a plan that trains the head alone.

On commit a605cba they took the place of the base model that the organization had approved: with privacy off one record's word and
label were read off exactly from the update, and the finished model of every organization had the server's encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity

from cotune.client.app import app
from cotune.client.audit_log import AuditLog
from cotune.client.site import Site
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, state_shapes
from cotune.protocol.messages import Recipient, encode_requests
from cotune.protocol.refusals import GENERIC_REFUSAL, parse_refusal
from tests.support.signing import sign_request

PRIVATE = {"epsilon": 8.0, "delta": 1e-3}


def ask(plan: Plan, site: Site, state: State, kind: str, round: int = 1, sent: State | None = None) -> Message:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    (content,) = encode_requests(plan.canonical(), round, state, [Recipient("clinic")], sent)
    sign_request(content, "finished" if kind == "evaluate" else "train")
    message = Message(content, 2, kind, group_id=str(round))
    message.metadata.__dict__["_message_id"] = "7"
    config = UserConfig({"site": str(site.folder)})
    return app(message, Context(1, 2, config, RecordDict(), UserConfig()))


def encoder_of(plan: Plan) -> State:
    """One weight of the encoder, as a server would like it."""
    model = get_plan_model(plan, "cpu")
    name = next(n for n, p in model.parameters() if n.startswith(model.prefix) and p.dim() == 2)
    return {name: 2 * model.state([name])[name]}


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
@pytest.mark.parametrize("privacy", ["none", PRIVATE])
def test_it_is_refused_and_nothing_is_charged_or_kept(
    make_plan: Callable[..., Plan], make_site: Callable[..., Site], state_for: Callable[..., State], kind: str, privacy: Any
) -> None:
    plan = make_plan(privacy=privacy)
    site = make_site()
    state = {**state_for(plan), **encoder_of(plan)}
    assert parse_refusal(str(ask(plan, site, state, kind).error.reason))[0] == GENERIC_REFUSAL
    assert "which no round up to 1 trains" in AuditLog(site.folder).last()["reason"]
    assert not site.ledger_file.exists()
    assert not (site.folder / "models").exists()
    assert not (site.folder / "outbox").exists()


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_so_are_other_shapes_and_tensors_that_no_term_asks_for(
    make_plan: Callable[..., Plan], make_site: Callable[..., Site], state_for: Callable[..., State], kind: str
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    state = state_for(plan)
    name = next(iter(state))
    assert ask(plan, site, {**state, name: torch.zeros(7)}, kind).has_error()
    assert ask(plan, site, state, kind, sent=dict(state)).has_error()
    assert not site.ledger_file.exists()
    assert not (site.folder / "models").exists()


def test_stage_parameters_are_refused_in_earlier_rounds(
    make_plan: Callable[..., Plan], make_site: Callable[..., Site], state_for: Callable[..., State]
) -> None:
    plan = make_plan(train=[{"mode": "head", "rounds": 1}, {"mode": "full", "rounds": 1}])
    site = make_site()
    state = state_for(plan, 2)
    assert ask(plan, site, state, MessageType.TRAIN, round=1).has_error()
    assert not ask(plan, site, state, MessageType.TRAIN, round=2).has_error()


@pytest.mark.parametrize("strategy", ["fedavg", "fedex", "flora", "flexlora"])
def test_what_a_fusion_of_adapters_changes_may_come(make_plan: Callable[..., Plan], strategy: str) -> None:
    plan = make_plan(
        train="lora",
        lora={"rank": 2, "factors": "ab"},
        strategy={"fusion": "mean"} if strategy == "fedavg" else {"fusion": strategy},
    )
    model = get_plan_model(plan, "cpu")
    names = set(state_shapes(plan, model, 1))
    weights = {adapter.weight for adapter in model.adapters()}
    assert {adapter.b for adapter in model.adapters()} <= names
    assert (weights <= names) == (strategy in ("fedex", "flora"))
    assert not any(".LayerNorm." in name for name in names)
