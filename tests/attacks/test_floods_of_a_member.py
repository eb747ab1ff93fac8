"""A member sends more than anybody asked it for: replies to nothing, objects that nobody fetches, downloads again and again.

On commit a605cba nothing counted what a member sent: 300 of 300 announcements that answered no request passed, as did 300 of 300
objects of 5 MiB (1.5 GB on the server's disk), and only a revocation ended it. Now 64 announcements pass, and, where the plan's
largest reply has 64 MiB, 51 objects; the member is named, and another goes on.
"""

from __future__ import annotations

from collections import Counter

import h11
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from cotune.server.proxy.allowed_calls import Refusal
from cotune.server.proxy.connection_slots import Slot
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.member_quotas import Quotas
from cotune.server.proxy.request_guard import RequestGuard
from cotune.server.proxy_process import FLEET_FORMAT
from tests.support.calls import new_key, public, signed

MALLORY = new_key()
NORTH = new_key()
CHUNK = 5 * 2**20
TRIES = 300


class TlsProxy:
    """The guard of a front, and whom it has named."""

    def __init__(self) -> None:
        self.named = Counter[str]()
        known = {public(MALLORY): "mallory", public(NORTH): "north"}.get
        self.guard = RequestGuard.of(
            Limits(), Quotas(reply=64 * 2**20), known, FLEET_FORMAT, lambda member, reason: self.named.update([member])
        )
        self.slots = {key: Slot(None, lambda: None) for key in (MALLORY, NORTH)}
        self._heads = {key: [(name.encode(), value.encode()) for name, value in signed(key).items()] for key in (MALLORY, NORTH)}

    def status(self, key: EllipticCurvePrivateKey, call: str, size: int) -> int:
        """Of a request with so much content; 200 where it may pass."""
        headers = [(b"host", b"x"), (b"content-length", str(size).encode()), *self._heads[key]]
        found = self.guard.admit(h11.Request(method=b"POST", target=f"/v1/fleet/{call}", headers=headers), self.slots[key])
        return found.status if isinstance(found, Refusal) else 200


@pytest.mark.parametrize(("call", "size", "passed"), [("push-messages", 1000, 64), ("push-object", CHUNK, 51)])
def test_a_flood_comes_to_an_end_and_its_sender_is_named(call: str, size: int, passed: int) -> None:
    front = TlsProxy()
    found = Counter(front.status(MALLORY, call, size) for _ in range(TRIES))
    assert set(found) == {200, 429}
    assert passed <= found[200] <= passed + 2  # some comes back while it goes on
    assert front.named == {"mallory": found[429]}
    assert front.status(NORTH, call, size) == 200
    assert front.status(MALLORY, "send-node-heartbeat", 100) == 200  # it can still be told that it is there


def test_downloads_again_and_again_come_to_an_end() -> None:
    front = TlsProxy()
    for _ in range(TRIES):
        if front.status(MALLORY, "pull-object", 100) != 200:
            break
        front.guard.usage.record_response("mallory", "pull-object", CHUNK)
    else:
        raise AssertionError("nothing ends it")
    assert front.named == {"mallory": 1}
    assert front.status(NORTH, "pull-object", 100) == 200
