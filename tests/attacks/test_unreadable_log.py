"""Requests that make an organization's own log unreadable, so that it can prove nothing, or takes no request of anybody any more.

On commit 15d5778 a server could sign a statement of 1,001 to 4,096 characters (a long reason for an earlier refusal): it was entered
cut to 1,000, and from then on every request, of this and of every other federation, was refused as "a signature contains ...". A
roster of 200 made-up keys of 100 wide letters made a line of 80 kB, of which the next one saw the last 64 kB: `cotune client sent` said that
somebody had changed the log, and `verify-trail` blamed the organization. And a server could renew its keys without end, 16 at each
request, each kept for ever.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cotune.client.audit_log import AuditLog
from cotune.client.node import trust
from cotune.client.node.requests import last_declarable_range
from cotune.client.node.trust import Trust, TrustedServer
from cotune.client.site import Site
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.protocol.key_renewal import ServerRenewal
from cotune.protocol.statements import RequestStatement
from tests.support.failures import fails_with
from tests.support.requests import ask, request
from tests.support.signing import FEDERATION, SERVER_KEY, sign_request


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


@pytest.mark.parametrize("letters", ["x" * 3000, "\u96ea" * 500])
def test_a_long_statement_leaves_the_site_as_it_was(
    plan: Plan, site: Site, state_for: Callable[[Plan], State], letters: str
) -> None:
    state = state_for(plan)
    first = request(plan, state)
    second = request(plan, state, round=2)
    statement = sign_request(first, refused=letters, strikes=1)
    assert ask(first, site).has_content()
    entry = next(entry for entry in AuditLog(site.folder).entries() if entry["what"] == "request")
    assert RequestStatement.parse(entry["statement"]) == statement
    assert last_declarable_range(AuditLog(site.folder), plan.plan_id) is None
    sign_request(second)
    assert ask(second, site).has_content()


@pytest.mark.parametrize("letter", ["\U0001f600", "\x01"])
def test_a_wide_roster_does_not_break_the_chain(plan: Plan, site: Site, state_for: Callable[[Plan], State], letter: str) -> None:
    state = state_for(plan)
    wide = tuple(letter * 96 + f"{i:04}" for i in range(200))
    first = request(plan, state)
    second = request(plan, state, round=2)
    sign_request(first, roster=wide)
    reply = ask(first, site)
    assert reply.has_error()
    sign_request(second)
    assert ask(second, site).has_content()
    entries = AuditLog(site.folder).entries()
    assert [entry["what"] for entry in entries] == ["refusal", "request", "update"]
    assert max(len(json.dumps(entry)) for entry in entries) < 2**16


def test_keys_are_not_renewed_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerRenewal, "check", lambda self: None)  # as if the certificates were real
    monkeypatch.setattr(trust, "_MAX_GENERATIONS", 20)
    keys = [SERVER_KEY, *(Ed25519PrivateKey.generate() for _ in range(40))]
    known = TrustedServer(signing_key=keys[0].public_key().public_bytes_raw().hex(), certificates="")
    believed = Trust(federation=FEDERATION, name="tests", generations=(known,))
    renewals = [ServerRenewal.make(FEDERATION, old, new, "") for old, new in itertools.pairwise(keys)]
    believed = believed.following(renewals[:16])
    with fails_with("run.too_many_renewals", "20"):
        believed.following(renewals[16:32])
