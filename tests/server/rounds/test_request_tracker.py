"""The requests of a round or of a delivery, on a transport whose clock the test sets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from cotune.server.request_outcomes import Lost
from cotune.server.rounds.requests import Requests, RequestTracker, RetryLimits
from cotune.server.transport.base import Reply
from cotune.server.transport.node_registry import Node

WHOLE = RecordDict()


@pytest.fixture(autouse=True)
def _a_task_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a message is stamped with."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@dataclass
class FakeTransport:
    """Two organizations; `now` is both the clock and when it was last seen who is connected."""

    now: float = 100.0
    since: dict[str, str] = field(default_factory=lambda: {"a": "", "b": ""})
    sent: list[str] = field(default_factory=list)
    contents: list[RecordDict] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    def connected(self) -> Mapping[str, Node]:
        return {name: Node(number, since) for number, (name, since) in enumerate(self.since.items(), 2)}

    def last_seen(self) -> float:
        return self.now

    def left(self) -> Collection[str]:
        return ()

    def revoked(self) -> Collection[str]:
        return ()

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        self.sent.append(organization)
        self.contents.append(message.content)

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        yield from self.replies

    def forget(self, round: int) -> None: ...

    def close(self) -> None: ...


def tracked(transport: FakeTransport) -> RequestTracker:
    requests = Requests(3, MessageType.TRAIN, {name: RecordDict() for name in transport.since}, 100)
    limits = RetryLimits(max_losses=2, max_requests=3, backoff=2.0)
    return RequestTracker(transport, requests, limits, lambda name: 60.0, lambda: transport.now)


def test_everybody_is_asked_once() -> None:
    transport = FakeTransport()
    tracker = tracked(transport)
    tracker.ask()
    tracker.ask()
    assert (transport.sent, tracker.waiting, tracker.idle) == (["a", "b"], ["a", "b"], [])


def test_lost_request_is_repeated_after_its_backoff_and_given_up() -> None:
    transport = FakeTransport()
    tracker = tracked(transport)
    tracker.ask()
    assert not tracker.note_lost("a", "gone")
    assert (tracker.idle, tracker.loss_of("a"), tracker.lost_at("a")) == (["a"], "gone", 100.0)
    transport.now = 101.9
    tracker.ask()
    assert transport.sent == ["a", "b"]
    transport.now = 102.0
    tracker.ask()
    assert transport.sent == ["a", "b", "a"]
    assert tracker.note_lost("a", "gone")


def test_reconnected_organization_is_asked_again_up_to_the_limit() -> None:
    transport = FakeTransport()
    tracker = tracked(transport)
    tracker.ask()
    for number in range(4):
        transport.now += 1
        transport.since["a"] = str(number)
        tracker.ask_reconnected()
    assert transport.sent == ["a", "b", "a", "a"]
    assert not tracker.note_lost("a", "gone")  # the other copies may be answered
    assert tracker.waiting == ["a", "b"]


def test_the_whole_state_is_sent_once_and_copies_from_before_are_heard_of_once_each() -> None:
    transport = FakeTransport()
    requests = Requests(3, MessageType.TRAIN, {"a": RecordDict(), "b": RecordDict()}, 100, lambda name, content: WHOLE)
    tracker = RequestTracker(transport, requests, RetryLimits(), lambda name: 60.0, lambda: transport.now)
    tracker.ask()
    transport.now += 1
    transport.since["a"] = "again"
    tracker.ask_reconnected()  # two copies are under way
    assert tracker.send_whole("a")
    assert tracker.idle == ["a"]
    tracker.ask()
    assert transport.sent == ["a", "b", "a", "a"]
    assert transport.contents[-1] is WHOLE
    assert tracker.send_whole("a")  # the answer to the other copy
    assert tracker.waiting == ["a", "b"]
    assert not tracker.send_whole("a")  # and now that to the whole state


def test_without_changes_nobody_is_asked_again_for_a_lost_version() -> None:
    transport = FakeTransport()
    tracker = tracked(transport)
    tracker.ask()
    assert not tracker.send_whole("a")
    assert tracker.waiting == ["a", "b"]


def test_postponed_organization_starts_again() -> None:
    transport = FakeTransport()
    tracker = tracked(transport)
    tracker.ask()
    tracker.note_lost("a", "gone")
    tracker.postpone("a")
    assert (tracker.loss_of("a"), tracker.losses("a"), tracker.idle) == ("", 0, ["a"])


def test_settled_organization_is_asked_and_heard_no_more() -> None:
    transport = FakeTransport()
    tracker = tracked(transport)
    tracker.ask()
    transport.now = 107.0
    tracker.note_reply("a")
    assert (tracker.seconds_taken, tracker.open, "a" in tracker) == ({"a": 7.0}, ["b"], False)
    transport.replies = [Reply(3, "a", Lost("late copy")), Reply(2, "a", Lost("of another round")), Reply(3, "b", Lost("x"))]
    assert [(reply.round, reply.organization) for reply in tracker.receive(0.0)] == [(2, "a"), (3, "b")]
