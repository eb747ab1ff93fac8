"""An organization that leaves is said to have left; one whose machine is gone is not."""

from __future__ import annotations

import time
from typing import Any

from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from cotune.flower.nodes import RegisteredNode
from cotune.server.deployment.node_registration import reconcile
from cotune.server.runs.events import observe_run
from cotune.server.transport import node_registry as presence
from cotune.server.transport.node_registry import LEFT, Presence, Seen
from tests.support.delivery import deliver, finished, receiving
from tests.support.registration import MEMBERS, SuperLink
from tests.support.rounds import NAMES, dropped, everybody, play
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import real, told, wild

HEARTBEATS = st.lists(st.floats(1, 1e9), min_size=1)


@given(HEARTBEATS, st.integers(1, 5))
def test_whose_heartbeats_are_missing_has_not_left(times: list[float], looks: int) -> None:
    """It is offline at the time that was told beforehand, or at a later one where a heartbeat came between two looks."""
    seen = Presence()
    for until in sorted(times):
        seen.look([Seen("a", True, until)])
    for _ in range(looks):
        seen.look([Seen("a", False, max(times))])
    assert not seen.left


@given(HEARTBEATS, st.floats(0.001, 60.0))
def test_node_offline_before_its_time_has_left_and_comes_back(times: list[float], early: float) -> None:
    seen = Presence()
    until = max(times)
    seen.look([Seen("a", True, until), Seen("b", True, until)])
    for _ in range(presence._LOOKS):
        assert not seen.left
        seen.look([Seen("a", False, until - max(early, 0.01 * until)), Seen("b", True, until)])
    assert seen.left == {"a"}
    seen.look([Seen("a", True, until + 1), Seen("b", True, until)])
    assert not seen.left


def test_anyone_who_reconnects_at_once_has_not_left() -> None:
    seen = Presence()
    for online, until in ((True, 60.0), (False, 10.0), (True, 90.0), (False, 20.0), (True, 100.0)):
        seen.look([Seen("a", online, until)])
        assert not seen.left


def test_anyone_who_leaves_during_a_round_is_reported_so(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"absent_seconds": 0.3}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.lost["org-2"] = 1
    grid.on_push = lambda name, message: grid.left.add(name) if name == "org-2" else None
    progress = play(folder, grid)
    assert progress.history[0]["absent"] == ["org-2"]
    assert dropped(progress) == [{"org-2": LEFT}]
    assert told(folder, "organization_left") == [{"event": "organization_left", "organization": "org-2"}]


def test_it_is_asked_when_it_joins_again(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 1.0}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.lost["org-2"] = 1

    def leaves(name: str, message: Message) -> None:
        if name == "org-2" and grid.pushed[name] == 1:
            grid.left.add(name)

    def joins(event: str, fields: dict[str, Any]) -> None:
        if event == "organization_left":
            grid.left.clear()

    grid.on_push = leaves
    with observe_run(joins):
        assert play(folder, grid).history[0]["participants"] == list(NAMES)


def test_organization_that_left_before_delivery_is_named(new_run: NewRun) -> None:
    folder = finished(new_run, server={"absent_seconds": 0.2, "min_timeout_seconds": 0.3, "quorum": 0.5})
    grid = receiving(folder)
    grid.on_push = lambda name, message: grid.left.add(name) if name == "org-2" else None
    grid.swallowed["org-2"] = 1
    assert deliver(grid, folder) == ["org-2"]
    [event] = told(folder, "delivery_failed")
    assert event["reason"] == "it has left the federation"


def test_the_server_says_that_a_member_has_left() -> None:
    superlink = SuperLink(MEMBERS[0].key)
    seen = Presence()
    said = list[str]()
    until = time.time() + 60
    for online, end in ((True, until), (False, until - 50), (False, until - 50)):
        nodes = (RegisteredNode(1, MEMBERS[0].key, online, "", end),)
        superlink.nodes = lambda nodes=nodes: nodes  # type: ignore[method-assign,misc]
        reconcile(superlink, MEMBERS[:1], said.append, seen)
    assert seen.left == {"a"}
