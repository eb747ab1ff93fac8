"""Requests that are too large by their heads alone are refused before anybody's signature is looked at: who sends them?

On commit a605cba the front refused them (413), and counted them for nobody: a member could go on for ever unnamed, and of a stranger
there was a line in a log. Now each is counted: a member's by its name, where the head is signed, anybody else's by the address.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import h11
import pytest

from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.front_refusals import RefusalLog
from cotune.server.deployment.status import look
from cotune.server.proxy.allowed_calls import Refusal
from cotune.server.proxy.connection_slots import Slot
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.member_quotas import Quotas
from cotune.server.proxy.request_guard import RequestGuard
from cotune.server.proxy_process import FLEET_FORMAT
from tests.support.calls import new_key, public, signed
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import real

MALLORY = new_key()
STRANGER = new_key()
TOO_LARGE = 2**30


def refused(
    keys: list[object], noted: tuple[object, object], slot: Slot, client: str = "198.51.100.1", headers: int = 0
) -> list[int]:
    guard = RequestGuard.of(Limits(), Quotas(), {public(MALLORY): "mallory"}.get, FLEET_FORMAT, *noted)  # type: ignore[arg-type]
    found = list[int]()
    for key in keys:
        shown = [(name.encode(), value.encode()) for name, value in signed(key).items()] if key else []  # type: ignore[arg-type]
        about = [(b"host", b"x"), (b"content-length", str(TOO_LARGE).encode()), *shown, (b"x", b"y" * headers)]
        answer = guard.admit(h11.Request(method=b"POST", target="/v1/fleet/push-object", headers=about), slot, client)
        assert isinstance(answer, Refusal)
        found.append(answer.status)
    return found


@pytest.mark.parametrize("headers", [0, 20_000])
@pytest.mark.parametrize(("address", "client"), [("203.0.113.7", "127.0.0.1"), (None, "203.0.113.7")])
def test_each_is_counted_by_name_or_by_address(address: str | None, client: str, headers: int) -> None:
    members = Counter[str]()
    addresses = Counter[str]()
    noted = (lambda member, reason: members.update([member]), lambda where, reason: addresses.update([where]))
    status = refused([MALLORY, None, STRANGER, MALLORY], noted, Slot(address, lambda: None), client, headers)
    assert set(status) == {431 if headers else 413}
    assert members == {"mallory": 2}
    assert addresses == {"203.0.113.7": 2}


def test_what_is_no_request_of_flowers_names_nobody() -> None:
    """As of those that look for open ports all day."""
    named = list[str]()
    record_member = lambda who, reason: named.append(who)  # noqa: E731
    guard = RequestGuard.of(Limits(), Quotas(), {public(MALLORY): "mallory"}.get, FLEET_FORMAT, record_member, record_member)
    request = h11.Request(method="GET", target="/", headers=[(b"host", b"x")])
    assert isinstance(guard.admit(request, Slot("203.0.113.7", lambda: None)), Refusal)
    assert named == []


def test_the_status_shows_both(new_run: NewRun) -> None:
    federation = FederationFolder(Path(real(new_run("mallory", "north")).file.federation))
    federation.superlink.mkdir()
    kept = RefusalLog(federation.superlink / "refused.json")
    refused([MALLORY, STRANGER, None], (kept.record_member, kept.record_address), Slot("203.0.113.7", lambda: None))
    kept._write_later()
    found = {(each.who, each.is_member): each.count for each in look(federation, None).refused}
    assert found == {("mallory", True): 1, ("203.0.113.7", False): 2}
