"""A request that shows two keys: the front must not count one member while the SuperLink serves another.

On commit 15d5778 the front took the last of several `flwr-public-key` headers and passed on all, of which the SuperLink takes the first: two
members together moved content under the quota, the connections and the name of whichever they liked.
"""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from cotune.server.proxy.allowed_calls import Refusal
from cotune.server.proxy.authentication import authenticate
from cotune.server.proxy_process import FLEET_FORMAT
from tests.support.calls import new_key, public, signed

ONE = new_key()
OTHER = new_key()
MEMBERS = {public(ONE): "north", public(OTHER): "mallory"}


def headers(*parts: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for part in parts for name, value in part.items()]


@pytest.mark.parametrize("times", [(ONE, OTHER), (OTHER, ONE)])
def test_both_sides_would_see_another_member(times: tuple[object, ...]) -> None:
    shown = headers(*(signed(key) for key in times))  # type: ignore[arg-type]
    assert Headers(raw=shown)["flwr-public-key"] != dict(shown)[b"flwr-public-key"].decode()
    assert isinstance(authenticate(shown, "pull-messages", MEMBERS.get, FLEET_FORMAT), Refusal)


@pytest.mark.parametrize("name", ["flwr-public-key", "flwr-signature", "flwr-timestamp"])
def test_none_of_the_three_is_shown_twice(name: str) -> None:
    once = signed(ONE)
    assert authenticate(headers(once), "pull-messages", MEMBERS.get, FLEET_FORMAT) == "north"
    assert isinstance(authenticate(headers(once, {name: once[name]}), "pull-messages", MEMBERS.get, FLEET_FORMAT), Refusal)
