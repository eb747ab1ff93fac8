"""Requests and answers by threads: in turn, no matter who hangs; what the rounds make of it is tests/server/rounds/test_requests.py's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, cast

import httpx
import pytest
from flwr.app import Message

from cotune.flower.chunks import TooLarge
from cotune.flower.runtime_client import RuntimeClient
from cotune.server.request_outcomes import Rejected
from cotune.server.time_limits import TimeLimits
from cotune.server.transport.node_registry import Node
from cotune.server.transport.superlink import SuperLinkTransport


class FakeLine:
    """Takes requests, which are names here; the first hangs."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.under_way = 0
        self.most = 0
        self.taken = list[str]()

    def push(self, message: Message) -> str:
        name = str(message)
        if name == "first":
            self.release.wait()
            return name
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(0.05)
        with self.lock:
            self.under_way -= 1
            self.taken.append(name)
        return name

    def list_replies(self, numbers: Sequence[str]) -> Mapping[str, Any]:
        return {}


class SlowLine:
    """An answer comes in so many pieces, with as many seconds before each."""

    def __init__(self, pieces: int, seconds: float) -> None:
        self._pieces = pieces
        self._seconds = seconds

    def push(self, message: Message) -> str:
        return str(message)

    def list_replies(self, numbers: Sequence[str]) -> Mapping[str, Any]:
        return {number: number for number in numbers}

    def fetch(self, answer: str, max_bytes: int, came: Callable[[], None]) -> Message | None:
        for _ in range(self._pieces):
            time.sleep(self._seconds)
            came()
        raise TooLarge("an answer like any other")


class Connected:
    def __init__(self, *names: str) -> None:
        self._names = names

    def connected(self) -> dict[str, Node]:
        return {name: Node(number) for number, name in enumerate(self._names)}

    def left(self) -> frozenset[str]:
        return frozenset()

    def revoked(self) -> frozenset[str]:
        return frozenset()


def connect(line: FakeLine | SlowLine, nodes: Connected, limits: TimeLimits) -> SuperLinkTransport:
    return SuperLinkTransport(cast(RuntimeClient, line), nodes, lambda *_, **__: None, limits)


@contextmanager
def released(line: FakeLine) -> Iterator[None]:
    try:
        yield
    finally:
        line.release.set()


def test_anyone_who_waits_behind_one_that_hangs_goes_on_in_turn() -> None:
    """Not all at once: each would send what is not there yet of what they have in common."""
    line = FakeLine()
    others = [f"org-{i}" for i in range(6)]
    with closing(connect(line, Connected(), TimeLimits(held_up=0.5))) as post, released(line):
        for name in ("first", *others):
            post.send(1, name, cast(Message, name), 100)
        deadline = time.monotonic() + 600
        while len(line.taken) < len(others) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sorted(line.taken) == others
    assert line.most == 1


@pytest.mark.parametrize(("pieces", "seconds", "reconnected"), [(10, 0.1, False), (1, 1.0, True)])
def test_slow_reply_is_not_taken_for_one_cut_off(pieces: int, seconds: float, reconnected: bool) -> None:
    """Who is asked again sends it all again, and is late for the next round."""
    limits = TimeLimits(watch=0.01, slow=0.5)
    with closing(connect(SlowLine(pieces, seconds), Connected("org-1"), limits)) as post:
        post.send(1, "org-1", cast(Message, "first"), 100)
        (reply,) = post.receive(10.0)
        assert isinstance(reply.content, Rejected)
        assert (post.connected()["org-1"].since != " 0") is reconnected  # so many times in doubt


def test_a_call_that_is_lost_puts_few_answers_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have marked as handed over whatever it was to announce."""
    names = [f"org-{i}" for i in range(9)]
    line = SlowLine(1, 0.0)

    def list_replies(numbers: Sequence[str]) -> Mapping[str, Any]:
        if "org-0" in numbers:
            raise httpx.ReadTimeout("slow")
        return {}

    monkeypatch.setattr(line, "list_replies", list_replies)
    with closing(connect(line, Connected(*names), TimeLimits(watch=0.01))) as post:
        for name in names:
            post.send(1, name, cast(Message, name), 100)
        deadline = time.monotonic() + 600
        while not (doubted := _doubted(post)) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 1 <= len(doubted) <= 4


def _doubted(post: SuperLinkTransport) -> list[str]:
    return [name for name, node in post.connected().items() if node.since != " 0"]
