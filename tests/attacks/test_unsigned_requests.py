"""Requests that the federation's key has not signed, or has signed for something else, come to nothing: nothing is charged.

On commit a605cba a site trained for anyone who could put a message into its queue: a member with `src_node_id = 1` (15 steps of 10
charged for a request that the coordinator never made), or an old request played again; and neither side could show what the
other had asked or sent. Each case below trained, and charged one round, there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, MessageType, RecordDict

from cotune.client.audit_log import AuditLog
from cotune.client.site import Site
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.protocol.signatures import attach, detach
from cotune.protocol.statements import FINISHED
from tests.support.requests import ask, request
from tests.support.signing import SERVER_KEY, sign_request

Change = Callable[[RecordDict], None]


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(privacy={"epsilon": 2.0, "delta": 1e-3})


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


def is_untouched(site: Site) -> bool:
    """Nothing was charged, trained or kept."""
    made = {file.name for file in site.folder.iterdir()}
    return not made & {"ledger.sqlite", "outbox", "kept", "models", "plans"}


def unsigned(content: RecordDict) -> None:
    """As a member or a server of before sends it."""


def by_another_key(content: RecordDict) -> None:
    sign_request(content, key=Ed25519PrivateKey.generate())


def for_another(content: RecordDict) -> None:
    sign_request(content, recipient="bank")


def of_another_federation(content: RecordDict) -> None:
    sign_request(content, federation=32 * "0")


def of_another_plan(content: RecordDict) -> None:
    sign_request(content, plan=64 * "9")


def of_another_round(content: RecordDict) -> None:
    sign_request(content, round=2)


def of_another_state(content: RecordDict) -> None:
    sign_request(content, received=64 * "9")


def of_another_kind(content: RecordDict) -> None:
    sign_request(content, FINISHED)


def with_another_roster(content: RecordDict) -> None:
    statement = sign_request(content)
    attach(content, statement, SERVER_KEY.sign(statement.message()).hex(), roster="a\nc")


def with_words_added(content: RecordDict) -> None:
    """The same fields in another order are another text."""
    statement = sign_request(content)
    attach(content, statement, SERVER_KEY.sign(statement.message()).hex(), roster="a\nb")
    record = content["signed"]
    assert isinstance(record, ConfigRecord)
    record["statement"] = str(record["statement"]).replace(",", ", ", 1)


def without_its_statement(content: RecordDict) -> None:
    content["signed"] = ConfigRecord({"signature": "00"})


@pytest.mark.parametrize(
    "change",
    [
        unsigned,
        by_another_key,
        for_another,
        of_another_federation,
        of_another_plan,
        of_another_round,
        of_another_state,
        of_another_kind,
        with_another_roster,
        with_words_added,
        without_its_statement,
    ],
)
def test_altered_request_is_refused_before_charging(
    plan: Plan, site: Site, state_for: Callable[..., State], change: Change
) -> None:
    content = request(plan, state_for(plan))
    change(content)
    assert ask(content, site).has_error()
    assert is_untouched(site)
    assert [entry["what"] for entry in AuditLog(site.folder).entries()] == ["refusal"]


def test_a_signed_one_is_answered(plan: Plan, site: Site, state_for: Callable[..., State]) -> None:
    """So that the cases above fail for what they change."""
    content = request(plan, state_for(plan))
    sign_request(content)
    assert not ask(content, site).has_error()
    assert len(site.ledger().spent()) == 1


def test_a_model_that_nobody_has_signed_is_not_kept(plan: Plan, site: Site, state_for: Callable[..., State]) -> None:
    content = request(plan, state_for(plan), round=3)
    assert ask(content, site, MessageType.EVALUATE).has_error()
    assert is_untouched(site)


@pytest.mark.parametrize("later", [{"round": 2}, {"round": 2, "run": 32 * "2"}])
def test_an_old_request_does_not_come_again(
    plan: Plan, site: Site, state_for: Callable[..., State], later: dict[str, Any]
) -> None:
    """Of an earlier round, or of another run; the last one itself may, and costs nothing."""
    state = state_for(plan)
    old = request(plan, state)
    new = request(plan, {n: t + 0.01 for n, t in state.items()}, later.get("round", 1))
    sign_request(old)
    assert not ask(old, site).has_error()
    assert not ask(old, site).has_error()  # its answer may have been lost
    assert len(site.ledger().spent()) == 1
    sign_request(new, **later)
    assert not ask(new, site).has_error()
    spent = len(site.ledger().spent())
    assert ask(old, site).has_error()
    assert "is an old one" in AuditLog(site.folder).last()["reason"]
    assert len(site.ledger().spent()) == spent


def test_one_request_is_not_put_together_from_two(plan: Plan, site: Site, state_for: Callable[..., State]) -> None:
    """The signature of one and the state of another."""
    state = state_for(plan)
    honest = request(plan, state)
    forged = request(plan, {name: torch.zeros_like(t) for name, t in state.items()})
    statement = sign_request(honest)
    _, signed = detach(honest)
    assert signed is not None
    attach(forged, statement, signed.signature, **signed.about)
    assert ask(forged, site).has_error()
    assert is_untouched(site)


def test_a_site_that_knows_no_key_takes_nothing(plan: Plan, site: Site, state_for: Callable[..., State]) -> None:
    """As after an update from a cotune that did not sign: it fails closed, and says what to do."""
    (site.folder / "node" / "trust.json").unlink()
    content = request(plan, state_for(plan))
    sign_request(content)
    assert ask(content, site).has_error()
    assert is_untouched(site)
    assert "cotune client join" in AuditLog(site.folder).last()["reason"]
