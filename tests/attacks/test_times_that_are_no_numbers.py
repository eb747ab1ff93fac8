"""A reply whose time is no number: the SuperLink stores NULL for it, and fails at every question for answers that touches it.

On commit 15d5778 one announcement with `ttl` = NaN, of one of four members of a real federation on loopback, made `pull-messages` of the process that
plays the run fail (HTTP 500, NoneType + float) until the deadline: the three updates that had come were never handed over, the run failed
("got 0 of 4 updates"), nobody was named, and the same again ended every `--resume`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import httpx
import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from cotune.flower.chunks import TooLarge
from cotune.flower.runtime_client import RuntimeClient
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.pushed_messages import SentObjects, find_push_problem
from cotune.server.proxy_process import FLEET_FORMAT
from cotune.server.time_limits import TimeLimits
from cotune.server.transport.node_registry import Node
from cotune.server.transport.superlink import SuperLinkTransport
from tests.support.calls import announcement

NO_TIMES = (math.nan, math.inf, -math.inf, -1.0, 1e300)


@pytest.fixture
def a_task_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.usefixtures("a_task_of_flower")
def test_flower_stores_a_time_that_is_no_number_and_fails_at_it() -> None:
    """The root: fails as soon as Flower has corrected it."""
    store = SqlObjectStore(":memory:")
    store.initialize()
    state = SqlLinkState(":memory:", NoOpFederationManager(), store)
    state.initialize()
    node = state.create_node("", "", b"key", 30.0)
    state.activate_node(node, 30.0)
    run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
    TaskIdentity.run_id = run
    asked = Message(RecordDict(), node, MessageType.TRAIN, ttl=60.0)
    asked.metadata.__dict__["_message_id"] = asked.object_id
    assert state.store_message_ins(asked) is not None
    reply = Message(Error(1001, "no"), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    reply.metadata.__dict__["_ttl"] = math.nan
    assert state.store_message_res(reply) is not None
    with pytest.raises(TypeError):
        state.get_message_res({asked.object_id}, run)


@pytest.mark.parametrize("value", NO_TIMES)
@pytest.mark.parametrize("field", ["ttl", "created_at"])
def test_the_front_refuses_it(field: str, value: float) -> None:
    request = announcement(**{field: value})
    assert find_push_problem(request.SerializeToString(), Limits().tree, SentObjects(FLEET_FORMAT)) is not None


@pytest.mark.parametrize("value", NO_TIMES)
def test_and_a_working_time_that_is_none(value: float) -> None:
    """It is added to that of the run, whose sum would be NULL for good."""
    request = announcement()
    request.clientapp_runtime_list[:] = [1.0, value]
    assert find_push_problem(request.SerializeToString(), Limits().tree, SentObjects(FLEET_FORMAT)) is not None


def test_an_honest_one_passes() -> None:
    request = announcement(ttl=3600.0, created_at=time.time())
    assert find_push_problem(request.SerializeToString(), Limits().tree, SentObjects(FLEET_FORMAT)) is None


class Poisoned:
    """A line to a SuperLink that fails whenever it is asked for one of its answers."""

    def __init__(self, poison: str) -> None:
        self._poison = poison

    def push(self, message: Message) -> str:
        return str(message)

    def get_nodes(self) -> list[Any]:
        return []

    def list_replies(self, numbers: Sequence[str]) -> Mapping[str, Any]:
        if self._poison in numbers:
            request = httpx.Request("POST", "https://127.0.0.1/v1/runtime/pull-messages")
            raise httpx.HTTPStatusError("500", request=request, response=httpx.Response(500, request=request))
        return {number: number for number in numbers}

    def fetch(self, answer: str, max_bytes: int, came: Callable[[], None]) -> Message | None:
        raise TooLarge("an answer like any other")


class Connected:
    def connected(self) -> dict[str, Node]:
        return {}

    def left(self) -> frozenset[str]:
        return frozenset()

    def revoked(self) -> frozenset[str]:
        return frozenset()


def test_one_at_which_the_superlink_fails_hides_no_other() -> None:
    """Whatever else a member may find to break it with."""
    line = cast(RuntimeClient, Poisoned("mallory"))
    names = ["north", "mallory", "south", "west"]
    came = set[str]()
    with closing(SuperLinkTransport(line, Connected(), lambda *_, **__: None, TimeLimits(poll=0.01))) as post:
        for name in names:
            post.send(1, name, cast(Message, name), 100)
        for _ in range(500):
            came |= {letter.organization for letter in post.receive(0.02)}
            if len(came) == 3:
                break
    assert came == {"north", "south", "west"}
