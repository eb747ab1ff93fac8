from __future__ import annotations

import dataclasses
import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity

from cotune.client import app as client_app
from cotune.client.app import app
from cotune.client.audit_log import AuditLog
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, change_policy
from cotune.protocol.messages import Recipient, decode_update, encode_requests, payload_bytes, state_digest
from cotune.protocol.refusals import parse_refusal
from cotune.protocol.signatures import content_digest, detach
from cotune.protocol.statements import ReplyStatement, RequestStatement, is_signed_by_node
from cotune.strategies.types import Update
from tests.support.signing import NODE_KEY, sign_request

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]

NODE = 2
SANITIZED = "it did not train; the reason is in its own log"  # whatever it was: the kind of failure may depend on a record
SIMULATED = {"partition-id": 0, "num-partitions": 1}


def ask(content: RecordDict, node_config: dict[str, Any], *, signed: bool = False) -> Message:
    """Signs a request, and sends it to the ClientApp of a node with this configuration. signed: whether its answer stays so."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    if "site" in node_config:
        sign_request(content)
    message = Message(content, NODE, MessageType.TRAIN, group_id="1")
    message.metadata.__dict__["_message_id"] = "7"  # as Flower's own grids do
    context = Context(run_id=1, node_id=NODE, node_config=UserConfig(node_config), state=RecordDict(), run_config=UserConfig())
    reply = app(message, context)
    if not signed and reply.has_content():
        reply.content, _ = detach(reply.content)
    assert reply.metadata.reply_to_message_id == "7"
    return reply


def request(plan: Plan, state: State, organization: str = "clinic", site: str = "", round: int = 1) -> RecordDict:
    (content,) = encode_requests(plan.canonical(), round, state, [Recipient(organization, site=site)])
    return content


def reason(reply: Message) -> str:
    """Why the organization did not train."""
    assert reply.has_error()
    assert not reply.has_content()
    assert reply.error.code == 1001
    assert reply.error.reason is not None
    return parse_refusal(reply.error.reason)[0]


@pytest.fixture
def plan(make_plan: MakePlan) -> Plan:
    return make_plan()


@pytest.fixture
def state(plan: Plan, state_for: StateFor) -> State:
    return state_for(plan)


def test_a_real_node_trains_on_its_own_site(plan: Plan, state: State, make_site: MakeSite) -> None:
    site = make_site()
    reply = ask(request(plan, state), {"site": str(site.folder)})
    update = decode_update(reply.content, plan.plan_id)
    assert (update.organization, update.round, update.examples, update.steps) == ("clinic", 1, 60, 4)
    assert update.delta.keys() == state.keys()
    assert all(bool(d.any()) for d in update.delta.values())
    kept = site.finished_update(plan.plan_id, 1, state_digest(state))
    assert kept is not None
    assert all(torch.equal(kept.delta[name], update.delta[name]) for name in state)


def test_a_simulated_node_trains_on_the_site_that_is_named(plan: Plan, state: State, make_site: MakeSite) -> None:
    for name in ("clinic", "bank"):
        site = make_site(name, simulated=True)
        reply = ask(request(plan, state, name, str(site.folder)), SIMULATED)
        assert decode_update(reply.content, plan.plan_id).organization == name


def test_the_nodes_own_site_overrules_the_request(plan: Plan, state: State, make_site: MakeSite) -> None:
    own = make_site(rows=range(30))
    other = make_site(simulated=True, at="other")
    for node_config in ({"site": str(own.folder)}, {"site": str(own.folder), **SIMULATED}):
        reply = ask(request(plan, state, site=str(other.folder)), node_config)
        assert decode_update(reply.content, plan.plan_id).examples == 30
    assert not (other.folder / "outbox").exists()


@pytest.mark.parametrize("node_config", [{}, SIMULATED])
def test_a_node_without_a_site(plan: Plan, state: State, node_config: dict[str, Any]) -> None:
    assert reason(ask(request(plan, state), node_config)) == SANITIZED


def test_a_real_node_does_not_take_a_site_from_a_request(plan: Plan, state: State, make_site: MakeSite) -> None:
    site = make_site(simulated=True)
    assert reason(ask(request(plan, state, site=str(site.folder)), {})) == SANITIZED
    assert not (site.folder / "outbox").exists()


def test_a_request_cannot_name_a_site_that_is_not_simulated(
    plan: Plan, state: State, make_site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(simulated=False)
    with caplog.at_level(logging.WARNING):
        got = reason(ask(request(plan, state, site=str(site.folder)), SIMULATED))
    assert "not a simulated one" in caplog.text
    assert str(site.folder) not in got
    assert not (site.folder / "outbox").exists()
    assert not (site.folder / "ledger.sqlite").exists()


def test_a_site_that_is_none(plan: Plan, state: State, tmp_path: Path) -> None:
    for node_config, named in (({"site": str(tmp_path / "gone")}, ""), (SIMULATED, str(tmp_path / "gone"))):
        assert reason(ask(request(plan, state, site=named), node_config)) == SANITIZED


@pytest.mark.parametrize("simulated", [True, False])
def test_a_request_for_another_organization(plan: Plan, state: State, make_site: MakeSite, simulated: bool) -> None:
    site = make_site(simulated=simulated)
    got = reason(ask(request(plan, state, "bank", str(site.folder)), {"site": str(site.folder)}))
    assert got == SANITIZED
    assert not (site.folder / "outbox").exists()


# --- why it was not done: everything from a simulated site, next to nothing from a real one


def spoiled_class(plan: Plan, site: Site) -> tuple[Plan, list[str]]:
    return plan.model_copy(update={"labels": ("bad", "good", "other")}), ["so", "other"]


def gone_records(plan: Plan, site: Site) -> tuple[Plan, list[str]]:
    (site.folder.parents[1] / "records.csv").unlink()
    return plan, ["records.csv"]


def damaged_outbox(plan: Plan, site: Site) -> tuple[Plan, list[str]]:
    (site.folder / "outbox").mkdir()
    (site.folder / "outbox" / "update.safetensors").write_text("secret")
    return plan, ["update.safetensors"]


def gone_row_numbers(plan: Plan, site: Site) -> tuple[Plan, list[str]]:
    (site.folder / "data-rows-0.npy").unlink()
    return plan, ["data-rows-0.npy"]


@pytest.mark.parametrize("spoil", [gone_records, damaged_outbox, gone_row_numbers])
def test_a_real_site_says_only_that_it_failed(
    plan: Plan,
    state: State,
    make_site: MakeSite,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Plan, Site], tuple[Plan, list[str]]],
) -> None:
    site = make_site()
    broken, telling = spoil(plan, site)
    with caplog.at_level(logging.WARNING):
        got = reason(ask(request(broken, state), {"site": str(site.folder)}))
    assert got == SANITIZED
    assert not any(word in got.split() or str(tmp_path) in got for word in telling)
    assert all(word in caplog.text for word in telling)  # the organization itself can read it


def test_real_site_names_only_the_declining_rule(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(privacy={"epsilon": 2.0, "delta": 1e-3})
    site = make_site(policy=change_policy(Policy.permissive(), {"training.max_rounds": 2}))
    with caplog.at_level(logging.WARNING):
        got = reason(ask(request(plan, state_for(plan)), {"site": str(site.folder)}))
    assert got == "declined: its rule training.max_rounds does not allow this plan"
    assert "the plan has 3 rounds, expected at most 2" in caplog.text  # for the organization's own eyes


@pytest.mark.parametrize(
    ("rules", "local", "delta", "problem"),
    [
        ({"training.min_examples": 61}, {}, 1e-3, "the data set has 60 records, expected at least 61"),
        ({"training.min_batch": 64}, {"batch_size": 0.2}, 1e-3, "a batch would have 12 records, expected at least 64"),
        ({"budget.delta_per_run": "1/n^1.1"}, {}, 0.014, "the plan asks for δ = 0.014, expected at most 0.011"),
        ({}, {}, 0.02, "expected at most 1/60"),
    ],
)
def test_series_of_plans_does_not_reveal_the_record_count(
    make_plan: MakePlan,
    make_site: MakeSite,
    state_for: StateFor,
    caplog: pytest.LogCaptureFixture,
    rules: dict[str, Any],
    local: dict[str, Any],
    delta: float,
    problem: str,
) -> None:
    """Whether one of these rules declines depends on the number: what is told must be the same as for any other failure."""
    plan = make_plan(privacy={"epsilon": 2.0, "delta": delta}, local={"batch_size": 12, "steps": 2, **local})
    site = make_site(policy=change_policy(Policy.permissive(), rules))
    with caplog.at_level(logging.WARNING):
        assert reason(ask(request(plan, state_for(plan)), {"site": str(site.folder)})) == SANITIZED
    assert problem in caplog.text
    assert problem in AuditLog(site.folder).last()["reason"]


def test_declined_plan_is_not_told_whether_records_are_readable(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor
) -> None:
    plan = make_plan()
    state = state_for(plan)
    site = make_site(policy=change_policy(Policy.permissive(), {"training.max_rounds": 2}))
    (site.folder / "data.json").unlink()
    assert "training.max_rounds" in reason(ask(request(plan, state), {"site": str(site.folder)}))


@pytest.mark.parametrize("privacy", ["none", {"epsilon": 2.0, "delta": 1e-3}])
@pytest.mark.parametrize("train", ["head", "lora"])
def test_a_plan_cannot_ask_which_classes_there_are(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, privacy: Any, train: str
) -> None:
    """Whether training fails must not depend on one record: one of a class that the plan lacks has no loss, and counts on."""
    plan = make_plan(privacy=privacy, train=train, labels=("bad", "good", "other"))
    site = make_site()
    reply = ask(request(plan, state_for(plan)), {"site": str(site.folder)})
    assert not reply.has_error(), reply.error.reason
    assert decode_update(reply.content, plan.plan_id).examples == 60


@pytest.mark.parametrize("spoil", [spoiled_class, gone_records, damaged_outbox])
def test_a_simulated_site_says_everything(
    plan: Plan, state: State, make_site: MakeSite, spoil: Callable[[Plan, Site], tuple[Plan, list[str]]]
) -> None:
    site = make_site(simulated=True)
    broken, telling = spoil(plan, site)
    got = reason(ask(request(broken, state, site=str(site.folder)), SIMULATED))
    assert all(word in got for word in telling)


@pytest.mark.parametrize("failure", [ValueError("patient 17 said: secret"), KeyError("secret"), MemoryError("secret")])
@pytest.mark.parametrize("simulated", [True, False])
def test_an_exception_is_answered_and_not_raised(
    plan: Plan,
    state: State,
    make_site: MakeSite,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    simulated: bool,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    site = make_site(simulated=simulated)
    monkeypatch.setattr(client_app, "train_round", fail)
    got = reason(ask(request(plan, state, site=str(site.folder)), SIMULATED if simulated else {"site": str(site.folder)}))
    if simulated:
        assert "secret" in got
    else:
        assert got == SANITIZED


def header(**fields: Any) -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        content["request"] = ConfigRecord({**content["request"], **fields})  # type: ignore[dict-item]

    return spoil


def without(key: str) -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        del content[key]

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        header(plan="{"),
        header(plan="[]"),
        header(plan="3"),
        header(plan=json.dumps({"name": "x"})),
        header(plan=json.dumps({"no such key": 1})),
        header(round="1"),
        header(round=4),
        header(protocol=0),
        without("request"),
        without("state"),
    ],
)
def test_a_malformed_request_is_answered(
    plan: Plan, state: State, make_site: MakeSite, spoil: Callable[[RecordDict], None]
) -> None:
    site = make_site()
    content = request(plan, state)
    spoil(content)
    got = reason(ask(content, {"site": str(site.folder)}))
    assert got == SANITIZED
    assert not (site.folder / "outbox").exists()


def test_a_repeated_request_gets_the_same_answer(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy={"epsilon": 2.0, "delta": 1e-3})
    site = make_site()
    state = state_for(plan)
    one, other = (decode_update(ask(request(plan, state), {"site": str(site.folder)}).content, plan.plan_id) for _ in range(2))
    assert all(torch.equal(one.delta[name], other.delta[name]) for name in state)
    assert one.epsilon == other.epsilon
    assert len(site.ledger().spent()) == 1


# --- the last look, and the log of what was sent


def test_what_leaves_is_in_the_log_before_it_leaves(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(privacy={"epsilon": 2.0, "delta": 1e-3})
    site = make_site()
    reply = ask(request(plan, state_for(plan)), {"site": str(site.folder), "server": "fed.example.org:9092"}, signed=True)
    content, signed = detach(reply.content)
    update = decode_update(content, plan.plan_id)
    asked, entry = AuditLog(site.folder).entries()
    assert (asked["what"], entry["what"], entry["server"]) == ("request", "update", "fed.example.org:9092")
    assert (entry["plan_id"], entry["plan"], entry["round"]) == (plan.plan_id, plan.name, 1)
    assert (entry["epsilon"], entry["epsilon_allowed"], entry["declared"]) == (update.epsilon, 2.0, 60)
    assert entry["bytes"] == sum(entry["records"].values()) == payload_bytes(content)
    assert entry["sha256"] == content_digest(content)
    assert signed is not None
    statement = ReplyStatement.parse(signed.text)
    assert statement.request == RequestStatement.parse(asked["statement"]).digest
    assert (statement.sha256, entry["statement"], entry["signature"]) == (entry["sha256"], signed.text, signed.signature)
    assert is_signed_by_node(statement, signed.signature, NODE_KEY.public_key())


def test_what_a_round_leaves_in_the_site_is_for_its_owner_alone(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor
) -> None:
    """Ledger, log, outbox and what is kept from round to round, whatever the mask of the process."""
    plan = make_plan(train="lora", strategy="fedsa", privacy={"epsilon": 8.0, "delta": 1e-3})
    state = state_for(plan)
    site = make_site()
    there = set(site.folder.rglob("*"))
    before = os.umask(0o022)
    try:
        assert not ask(request(plan, state), {"site": str(site.folder)}).has_error()
    finally:
        os.umask(before)
    made = {file for file in site.folder.rglob("*") if file.is_file()} - there
    assert {file.relative_to(site.folder).parts[0] for file in made} >= {"ledger.sqlite", "audit.jsonl", "outbox", "kept"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in made} == {0o600}


def test_a_simulated_site_keeps_no_log(plan: Plan, state: State, make_site: MakeSite) -> None:
    site = make_site(simulated=True)
    assert not ask(request(plan, state, site=str(site.folder)), SIMULATED).has_error()
    assert not (site.folder / "audit.jsonl").exists()


@pytest.mark.parametrize("simulated", [True, False])
def test_what_was_not_agreed_on_is_stopped(
    plan: Plan, state: State, make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, simulated: bool
) -> None:
    """As if a mistake in training let a metric through."""

    def leaky(*arguments: Any, **options: Any) -> Update:
        return dataclasses.replace(train_round(*arguments, **options), disclosures={"records": 60.0})

    site = make_site(simulated=simulated)
    monkeypatch.setattr(client_app, "train_round", leaky)
    got = reason(ask(request(plan, state, site=str(site.folder)), SIMULATED if simulated else {"site": str(site.folder)}))
    if simulated:
        assert "nothing was sent: the update discloses 'records', which plan and policy do not agree on" in got
    else:
        assert got == SANITIZED
        _, entry = AuditLog(site.folder).entries()
        assert (entry["what"], entry["said"]) == ("blocked", SANITIZED)
        assert "the update discloses 'records'" in entry["reason"]


def test_nothing_leaves_that_cannot_be_entered(plan: Plan, state: State, make_site: MakeSite) -> None:
    site = make_site()
    (site.folder / "audit.jsonl").mkdir()
    assert reason(ask(request(plan, state), {"site": str(site.folder)})) == SANITIZED


@pytest.mark.parametrize("text", [{"labels": ["bad", "\ud800"]}, {"model": {"base": "\udfff"}}])
def test_a_plan_of_half_characters_is_refused_and_entered(
    plan: Plan, state: State, make_site: MakeSite, text: dict[str, Any]
) -> None:
    """It cannot be hashed, and what is raised here would go to the server of a stock node."""
    site = make_site()
    content = request(plan, state)
    table = json.loads(plan.canonical())
    table |= {key: {**table[key], **value} if isinstance(value, dict) else value for key, value in text.items()}
    header(plan=json.dumps(table))(content)
    assert reason(ask(content, {"site": str(site.folder)})) == SANITIZED
    [entry] = AuditLog(site.folder).entries()
    assert (entry["what"], entry["said"]) == ("refusal", SANITIZED)
    assert "half a character" in entry["reason"]


def test_a_plan_of_endless_depth_is_refused_and_entered(plan: Plan, state: State, make_site: MakeSite) -> None:
    site = make_site()
    content = request(plan, state)
    header(plan="[" * 100_000)(content)
    assert reason(ask(content, {"site": str(site.folder)})) == SANITIZED
    assert [entry["what"] for entry in AuditLog(site.folder).entries()] == ["refusal"]


def test_a_refusal_is_in_the_log_with_its_reason(plan: Plan, state: State, make_site: MakeSite) -> None:
    site = make_site(policy=change_policy(Policy.permissive(), {"training.max_rounds": 2}))
    said = reason(ask(request(plan, state), {"site": str(site.folder)}))
    [entry] = AuditLog(site.folder).entries()
    assert (entry["what"], entry["said"]) == ("refusal", said)
    assert "the plan has 3 rounds, expected at most 2" in entry["reason"]
