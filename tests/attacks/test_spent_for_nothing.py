"""An organization whose number of records the coordinator does not take is told so before it spends anything.

On commit a605cba the range of `cotune server invite --examples` stayed at the coordinator: an organization that declared 1 record
trained three rounds, spent ε = 1.46 of its budget, was struck out, got no model and never heard why. Each case below trained, and
charged a round, there; and anyone who was left out of a run was sent nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity

from cotune.client.app import app
from cotune.client.audit_log import AuditLog
from cotune.client.consent.preflight import run_preflight
from cotune.client.site import Site
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, change_policy
from cotune.protocol.messages import Recipient, encode_requests
from cotune.protocol.refusals import parse_refusal
from cotune.protocol.statements import FINISHED
from tests.support.signing import sign_request

RANGE = {"least": 500, "most": 20_000}


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(privacy={"epsilon": 2.0, "delta": 1e-3})


def ask(plan: Plan, state: State, site: Site, kind: str = MessageType.TRAIN, **signed: Any) -> Message:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    (content,) = encode_requests(plan.canonical(), 1, state, [Recipient("clinic")])
    sign_request(content, FINISHED if kind == MessageType.EVALUATE else "train", **signed)
    message = Message(content, 2, kind, group_id="1")
    message.metadata.__dict__["_message_id"] = "7"
    config = UserConfig({"site": str(site.folder)})
    return app(message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config=UserConfig()))


def said(reply: Message) -> str:
    assert reply.has_error()
    return parse_refusal(reply.error.reason or "")[0]


@pytest.mark.parametrize(
    "rules",
    [{"disclosures.example_count": "declared", "disclosures.declared_examples": 1}, {"disclosures.example_count": "exact"}],
)
def test_record_count_out_of_range_is_declined_before_charging(
    plan: Plan,
    make_site: Callable[..., Site],
    state_for: Callable[..., State],
    rules: dict[str, Any],
) -> None:
    site = make_site(policy=change_policy(Policy.permissive(), rules))
    assert "disclosures.example_count" in said(ask(plan, state_for(plan), site, **RANGE))
    assert not site.ledger_file.exists()
    assert not (site.folder / "outbox").exists()
    assert [broken.rule for broken in run_preflight(plan, site).broken] == ["disclosures.example_count"]


def test_a_declared_number_is_judged_before_the_records_are_read(
    plan: Plan, make_site: Callable[..., Site], state_for: Callable[..., State]
) -> None:
    rules = {"disclosures.example_count": "declared", "disclosures.declared_examples": 1}
    site = make_site(policy=change_policy(Policy.permissive(), rules))
    document = json.loads((site.folder / "data.json").read_bytes())
    document["portions"][0]["path"] = str(site.folder / "gone.csv")
    (site.folder / "data.json").write_text(json.dumps(document))
    assert "disclosures.example_count" in said(ask(plan, state_for(plan), site, **RANGE))


def test_a_number_within_the_range_trains(plan: Plan, make_site: Callable[..., Site], state_for: Callable[..., State]) -> None:
    site = make_site(policy=change_policy(Policy.permissive(), {"disclosures.example_count": "exact"}))
    assert not ask(plan, state_for(plan), site, least=60, most=60).has_error()


def test_audit_log_records_rejected_updates_and_the_end(
    plan: Plan, make_site: Callable[..., Site], state_for: Callable[..., State], caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    reason = "its norm is 7, expected at most 2"
    with caplog.at_level(logging.WARNING, "cotune"):
        assert not ask(plan, state_for(plan), site, refused=reason, strikes=1).has_error()
    assert reason in caplog.text
    assert ask(plan, {}, site, MessageType.EVALUATE, refused=reason, strikes=3).has_error()
    last = next(iter(AuditLog(site.folder).newest_first()))
    assert (last["what"], reason in last["reason"]) == ("refusal", True)
    assert not (site.folder / "models").exists()
