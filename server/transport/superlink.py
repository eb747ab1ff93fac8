"""The post of a real run: a line whose calls may be slow, hang or fail.

Requests are handed over, and answers fetched, by threads of their own, so that anyone who hangs holds up nobody else, nor the end
of
a round or of the process.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

import httpx
from flwr.app import Message

from cotune.errors import RunError
from cotune.flower.chunks import Aborted, Malformed, TooLarge
from cotune.flower.runtime_client import RunStopped, RuntimeClient
from cotune.server.outcomes import Lost, Rejected
from cotune.server.transport.base import Reply
from cotune.server.transport.node_registry import Node, NodeRegistry

_WATCH_SECONDS = 0.5  # between two looks at who is connected
_SILENT_SECONDS = 10.0  # a SuperLink that has answered nothing for so long is out of reach
_POLL_SECONDS = 0.1  # between two looks for answers, at least
_MOST_POLL_SECONDS = 1.0
_LATER = 0.05  # of the time without an answer so far: looks become rarer, and an answer is found late by that share at most
_LONGEST_WAIT_SECONDS = 2.0  # before a look that failed is made again
_AWAY_SECONDS = 5.0  # without an answer from the SuperLink: whatever it was handing over then may be lost
_SLOW_SECONDS = 20.0  # without a piece of an answer: it may have been cut off while it was sent
_AT_A_TIME = 4  # answers that are fetched, or wait to be added: each is as large as the model
_HELD_UP_SECONDS = 30.0  # who hangs for so long holds up nobody else any more
_CLOSE_SECONDS = 1.0  # a call after the end of a run would be refused
_LOST = (3, 4, 5)  # Flower's error codes for a message, a reply or a node that is gone

Tell = Callable[..., None]


@dataclass(eq=False)
class _Asked:
    """A request that may be answered. since: when its answer began to be fetched; infinite once that was found slow. latest: when
    the last piece of it came.
    """

    round: int
    organization: str
    max_bytes: int
    since: float | None = None
    latest: float = 0.0

    def came(self) -> None:
        self.latest = time.monotonic()


class _Turns:
    """One after the other. Anyone who hangs is overtaken by one, not by all at once: each would send all that is not there
    yet."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holder: object | None = None
        self._since = 0.0

    @contextmanager
    def taken(self) -> Iterator[None]:
        ours = object()
        with self._free:
            while self._holder and (left := self._since + _HELD_UP_SECONDS - time.monotonic()) > 0:
                self._free.wait(left)
            self._holder = ours
            self._since = time.monotonic()
        try:
            yield
        finally:
            with self._free:
                if self._holder is ours:
                    self._holder = None
                    self._free.notify()


class SuperLinkTransport:
    """In threads of its own, which end with the process however they hang."""

    def __init__(self, line: RuntimeClient, nodes: NodeRegistry, tell: Tell) -> None:
        self._line = line
        self._nodes = nodes
        self._tell = tell
        self._replies: SimpleQueue[tuple[Reply, bool]] = SimpleQueue()  # whether it is one of those at a time
        self._hands = threading.Semaphore(_AT_A_TIME)
        self._turns = _Turns()
        self._asked: dict[str, _Asked] = {}  # number -> request
        self._closed = threading.Event()
        self._stopped = threading.Event()
        self._found: Mapping[str, Node] = {}
        self._told_left: frozenset[str] = frozenset()
        self._last_seen = 0.0
        self._began = time.monotonic()
        self._failure = ""
        self._away = False
        self._active = time.monotonic()  # when a request was handed over, or an answer found, last
        # times that all answers, and one's, may have been lost on the way
        self._returns = 0
        self._doubts = Counter[str]()
        self._threads: list[threading.Thread] = []
        self._start("watch", self._watch)
        self._start("collect", self._collect)

    def _start(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._until_stopped, args=(work, *arguments), name=f"cotune-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _until_stopped(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except RunStopped:
            self._stopped.set()

    def connected(self) -> Mapping[str, Node]:
        """Whose answer may have been lost on the way counts as connected anew: Flower hands over each answer only once."""
        self._check()
        lost = {name: self._returns + self._doubts[name] for name in self._found}
        return {name: replace(node, since=f"{node.since} {lost[name]}") for name, node in self._found.items()}

    def last_seen(self) -> float:
        return self._last_seen

    def left(self) -> frozenset[str]:
        return self._nodes.left()

    def revoked(self) -> frozenset[str]:
        return self._nodes.revoked()

    def _watch(self) -> None:
        refused = False
        while not self._closed.is_set():
            try:
                started = time.monotonic()
                self._found = self._nodes.connected()
                if self._last_seen and (refused or time.monotonic() - self._last_seen > _AWAY_SECONDS):
                    self._returns += 1
                self._last_seen = started
                self._failure = ""
                refused = False
                self._doubt_the_slow()
            except RunStopped:
                raise
            except Exception as error:
                self._failure = _words(error)
                refused = refused or isinstance(error, httpx.ConnectError)
            self._closed.wait(_WATCH_SECONDS)

    def _doubt_the_slow(self) -> None:
        for asked in list(self._asked.values()):
            if asked.since is not None and time.monotonic() - max(asked.since, asked.latest) > _SLOW_SECONDS:
                asked.since = math.inf  # once
                self._doubts[asked.organization] += 1

    def _check(self) -> None:
        """Tells when the connection is lost, or back. Raises RunError when the run was stopped."""
        if self._stopped.is_set():
            raise RunError("the run was stopped at the SuperLink: expected it to go on; continue it with --resume")
        away = time.monotonic() - max(self._last_seen, self._began) > _SILENT_SECONDS
        if away and not self._away:
            self._tell(
                "connection_lost", reason=self._failure or f"the SuperLink has not answered for {_SILENT_SECONDS:g} seconds"
            )
        elif self._away and not away:
            self._tell("connection_restored")
        self._away = away
        self._tell_who_left()

    def _tell_who_left(self) -> None:
        left = self.left()
        before = self._told_left
        self._told_left = left
        for name in sorted(left - before):
            self._tell("organization_left", organization=name)

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        self._start(organization, self._hand_over, _Asked(round, organization, max_bytes), message)

    def _hand_over(self, asked: _Asked, message: Message) -> None:
        """One after the other: what several requests have in common is sent once."""
        try:
            with self._turns.taken():
                if self._closed.is_set():
                    return
                number = self._line.push(message)
        except RunStopped:
            raise
        except Exception as error:
            return self._lose(asked, f"its request could not be handed over: {_words(error)}")
        if not number:
            return self._lose(asked, "the SuperLink did not take its request")
        self._asked[number] = asked
        self._active = time.monotonic()

    def _lose(self, asked: _Asked, reason: str) -> None:
        self._replies.put((Reply(asked.round, asked.organization, Lost(reason)), False))

    def _collect(self) -> None:
        wait = _POLL_SECONDS
        while not self._closed.wait(wait):
            waiting = [(number, asked) for number, asked in list(self._asked.items()) if asked.since is None]
            some = [dict(waiting[first : first + _AT_A_TIME]) for first in range(0, len(waiting), _AT_A_TIME)]
            answered = [self._look(few) for few in some]
            wait = self._pause() if all(answered) else min(_LONGEST_WAIT_SECONDS, 2 * wait)

    def _pause(self) -> float:
        """Seconds until the next look: a SuperLink answers some thirty calls a second, from all organizations together."""
        return min(_MOST_POLL_SECONDS, max(_POLL_SECONDS, _LATER * (time.monotonic() - self._active)))

    def _look(self, waiting: Mapping[str, _Asked]) -> bool:
        """Whether the SuperLink has said who has answered. A few at a time: a call that takes too long loses all answers that it
        was to announce. Where it fails at one of them, that one must not hide the answers of the others.
        """
        try:
            found = self._line.announced(list(waiting))
        except RunStopped:
            raise
        except Exception as error:  # it is busy, or starting; `_watch` tells of it
            if isinstance(error, httpx.HTTPStatusError) and len(waiting) > 1:
                looked = [self._look({number: asked}) for number, asked in waiting.items()]
                return any(looked)
            if _may_be_gone(error):
                self._doubts.update(asked.organization for asked in waiting.values())
            return False
        for number in found.keys() & waiting.keys():
            self._active = time.monotonic()
            waiting[number].since = self._active
            self._start(waiting[number].organization, self._fetch, number, waiting[number], found[number])
        return True

    def _fetch(self, number: str, asked: _Asked, answer: Any) -> None:
        held = self._hands.acquire(timeout=_HELD_UP_SECONDS)
        try:
            reply = self._fetch_reply(asked, answer)
            if reply is None:
                asked.since = None
            else:
                self._asked.pop(number, None)
                self._replies.put((reply, held))
                held = False
        finally:
            if held:
                self._hands.release()

    def _fetch_reply(self, asked: _Asked, answer: Any) -> Reply | None:
        """Return None where the reply is to be looked for again."""
        content: Message | Lost | Rejected | None
        try:
            content = self._line.fetch(answer, asked.max_bytes, asked.came)
        except RunStopped:
            raise
        except (TooLarge, Malformed) as error:
            content = Rejected(str(error))
        except Aborted as error:
            content = Lost(f"its answer was cut off: {error}")
        except Exception as error:
            self._doubts[asked.organization] += _may_be_gone(error)
            return None
        if isinstance(content, Message) and content.has_error() and content.error.code in _LOST:
            content = Lost("it has left, or its machine or network is gone; it is asked again when it comes back")
        return None if content is None else Reply(asked.round, asked.organization, content)

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        """Yield replies; the place of one that was fetched is free again once the next is asked for."""
        wait = 0.0 if last else seconds
        while True:
            self._check()
            try:
                reply, held = self._replies.get(timeout=wait) if wait else self._replies.get_nowait()
            except Empty:
                return
            wait = 0.0
            if not isinstance(reply.content, Lost):
                self._settle(reply.round, reply.organization)
            try:
                yield reply
            finally:
                if held:
                    self._hands.release()

    def _settle(self, round: int, organization: str) -> None:
        """Whatever else it was asked in this round needs no answer."""
        for number, asked in list(self._asked.items()):
            if (asked.round, asked.organization) == (round, organization):
                self._asked.pop(number, None)

    def forget(self, round: int) -> None:
        for number, asked in list(self._asked.items()):
            if asked.round <= round:
                self._asked.pop(number, None)

    def close(self) -> None:
        """Ends the threads, but for those that hang: they end with the process."""
        self._closed.set()
        self._asked.clear()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _may_be_gone(error: Exception) -> bool:
    """Whether an answer may have been handed over when a call failed: not where the call did not get there, nor where it was
    refused before anything was handed over.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return not error.request.url.path.endswith("/pull-messages")
    return not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)


def _words(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
