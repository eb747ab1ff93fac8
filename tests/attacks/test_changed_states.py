"""Attack: a server that sends changes of the state which build something else than it has signed, or more than was agreed on.

An organization answers that it lacks the version, in words that are the same whatever is wrong, before it charges its budget or
reads a record; with the whole state it trains, in the same round and under the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from torch import Tensor

from cotune.client.audit_log import AuditLog
from cotune.client.site import Site
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.protocol.changes import RoundChange, add_change
from cotune.protocol.codecs import round_to, rounding_generator
from cotune.protocol.messages import Recipient, RequestEncoder, decode_update, received_digest, state_digest
from cotune.protocol.refusals import GENERIC_REFUSAL, WHOLE_STATE, parse_refusal
from cotune.protocol.signatures import SIGNED, detach
from tests.support.requests import ask
from tests.support.signing import sign_request


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(rounds=4, wire_down="int8", privacy={"epsilon": 4.0, "delta": 1e-3})


@pytest.fixture
def start(plan: Plan, state_for: Callable[..., State]) -> State:
    return state_for(plan)


@pytest.fixture
def site(plan: Plan, start: State, make_site: Callable[..., Site]) -> Site:
    """After its first round."""
    made = make_site()
    content = RequestEncoder(plan.canonical(), 1, start).encode(Recipient("clinic"))
    sign_request(content)
    assert decode_update(detach(ask(content, made).content)[0], plan.plan_id).round == 1
    return made


def honest_change(start: State) -> State:
    return {
        name: round_to("int8", torch.full_like(tensor, 0.01), rounding_generator(7, "the server", 1, name))
        for name, tensor in start.items()
    }


def second(
    plan: Plan,
    start: State,
    change: Mapping[str, Tensor],
    signed: Mapping[str, Tensor],
    *,
    versions: tuple[str, str] | None = None,
    round: int = 2,
) -> RecordDict:
    """A request for the second round. signed: the state whose digest the statement holds."""
    known = RoundChange(round - 1, versions[0] if versions else state_digest(start), frozenset(start), change)
    content = RequestEncoder(plan.canonical(), round, dict(signed), changes=[known], codec="int8").encode_since(
        Recipient("clinic"), round - 1
    )
    if versions:
        content["request"] = ConfigRecord({**dict(content["request"]), "versions": " ".join(versions)})  # type: ignore[arg-type]
    sign_request(content, received=received_digest(signed), round=round, recipient="clinic", plan=plan.plan_id)
    return content


def said(reply: Message) -> str:
    assert reply.has_error()
    return parse_refusal(reply.error.reason or "")[0]


def entries(site: Site) -> list[str]:
    return [str(entry["what"]) for entry in AuditLog(site.folder).newest_first()][::-1]


def ledger_bytes(site: Site) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(site.folder.glob("ledger.sqlite*")))


def test_an_honest_change_is_trained(plan: Plan, start: State, site: Site) -> None:
    change = honest_change(start)
    moved = add_change(start, change)
    update = decode_update(detach(ask(second(plan, start, change, moved), site).content)[0], plan.plan_id)
    assert (update.round, update.received) == (2, state_digest(moved))


def test_a_request_that_comes_again_gets_the_same_update(plan: Plan, start: State, site: Site) -> None:
    change = honest_change(start)
    content = second(plan, start, change, add_change(start, change))
    first, again = (decode_update(detach(ask(content, site).content)[0], plan.plan_id) for _ in range(2))
    assert all(torch.equal(first.delta[name], again.delta[name]) for name in first.delta)


def of_other_values(start: State) -> State:
    return {name: 2 * tensor for name, tensor in honest_change(start).items()}


def of_another_shape(start: State) -> State:
    name = sorted(start)[0]
    return {name: torch.ones(1)}


def of_the_base_model(start: State) -> State:
    return {**honest_change(start), "bert.embeddings.word_embeddings.weight": torch.ones(3, 16)}


@pytest.mark.parametrize("make", [of_other_values, of_another_shape, of_the_base_model])
def test_what_is_not_signed_is_not_trained(plan: Plan, start: State, site: Site, make: Callable[[State], State]) -> None:
    moved = add_change(start, honest_change(start))
    before = ledger_bytes(site)
    assert said(ask(second(plan, start, make(start), moved), site)) == WHOLE_STATE
    assert ledger_bytes(site) == before
    assert entries(site)[-1] == "refusal"


def test_named_digests_do_not_replace_the_signed_one(plan: Plan, start: State, site: Site) -> None:
    """What is built is what the header names, and not what was signed."""
    change = of_other_values(start)
    built = add_change(start, change)
    moved = add_change(start, honest_change(start))
    content = second(plan, start, change, moved, versions=(state_digest(start), state_digest(built)))
    before = ledger_bytes(site)
    assert said(ask(content, site)) == GENERIC_REFUSAL
    assert ledger_bytes(site) == before
    held = site.kept_folder(plan.plan_id, "received") / "state.safetensors"
    assert said(ask(second(plan, built, change, built), site)) == WHOLE_STATE  # nothing of it was kept
    assert held.exists()


def test_parameters_of_the_base_model_are_not_added_whole(plan: Plan, start: State, site: Site) -> None:
    """Under a true signature: the names of what is built are checked as those of a whole state."""
    change = honest_change(start)
    moved = {**add_change(start, change), "bert.embeddings.word_embeddings.weight": torch.ones(3, 16)}
    before = ledger_bytes(site)
    assert said(ask(second(plan, start, change, moved), site)) == GENERIC_REFUSAL
    assert ledger_bytes(site) == before


def test_values_that_no_parameter_has_are_refused(plan: Plan, start: State, site: Site) -> None:
    change = {name: torch.full_like(tensor, 2.0**100) for name, tensor in start.items()}
    before = ledger_bytes(site)
    assert said(ask(second(plan, start, change, add_change(start, change)), site)) == GENERIC_REFUSAL
    assert ledger_bytes(site) == before


@pytest.mark.parametrize("lost", [True, False])
def test_the_whole_under_the_same_signature_is_trained(plan: Plan, start: State, site: Site, lost: bool) -> None:
    """lost: the organization lacks the version; else the server's changes were damaged."""
    change = honest_change(start)
    moved = add_change(start, change)
    if lost:
        (site.kept_folder(plan.plan_id, "received") / "state.safetensors").unlink()
    content = second(plan, start, change if lost else of_other_values(start), moved)
    assert said(ask(content, site)) == WHOLE_STATE
    whole = RequestEncoder(plan.canonical(), 2, moved).encode(Recipient("clinic"))
    whole[SIGNED] = content[SIGNED]
    update = decode_update(detach(ask(whole, site).content)[0], plan.plan_id)
    assert update.received == state_digest(moved)
    assert entries(site) == ["request", "update", "refusal", "request", "update"]


def test_a_finished_model_is_no_change(plan: Plan, start: State, site: Site) -> None:
    content = second(plan, start, {}, start)
    sign_request(content, "finished", received=received_digest(start), round=2, recipient="clinic", plan=plan.plan_id)
    reply = ask(content, site, MessageType.EVALUATE)
    assert reply.has_content()  # it builds what was signed, so that nothing is won by it
    assert not (site.kept_folder(plan.plan_id, "received") / "state.safetensors").exists()


def test_an_unapproved_plan_learns_nothing_of_what_is_held(
    plan: Plan, start: State, site: Site, make_plan: Callable[..., Any]
) -> None:
    other = make_plan(rounds=4, wire_down="int8", seed=99, privacy={"epsilon": 4.0, "delta": 1e-3})
    (site.folder / "policy.toml").write_text("")
    assert said(ask(second(other, start, {}, start), site)) != WHOLE_STATE
