"""Requests and answers by threads: in turn, whoever hangs; what the rounds make of it is tests/server/test_asking.py's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, cast

import pytest
from flwr.app import Message

from cotune.server import carriers
from cotune.server.addresses import Node
from cotune.server.carriers import Threaded
from cotune.server.line import Line


class FakeLine:
    """Takes requests, which are names here; the first hangs."""

    def __init__(self) -> None:
        self.release, self.lock = threading.Event(), threading.Lock()
        self.under_way, self.most, self.taken = 0, 0, list[str]()

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

    def announced(self, numbers: Sequence[str]) -> Mapping[str, Any]:
        return {}


class Nobody:
    def connected(self) -> dict[str, Node]:
        return {}


@contextmanager
def released(line: FakeLine) -> Iterator[None]:
    try:
        yield
    finally:
        line.release.set()


def test_whoever_waits_behind_one_that_hangs_goes_on_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all at once: each would send what is not there yet of what they have in common."""
    monkeypatch.setattr(carriers, "_HELD_UP_SECONDS", 0.5)
    line, others = FakeLine(), [f"org-{i}" for i in range(6)]
    with closing(Threaded(cast(Line, line), Nobody(), lambda *_, **__: None)) as post, released(line):
        for name in ("first", *others):
            post.send(1, name, cast(Message, name), 100)
        deadline = time.monotonic() + 10.0
        while len(line.taken) < len(others) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sorted(line.taken) == others
    assert line.most == 1
