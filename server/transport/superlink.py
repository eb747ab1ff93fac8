"""The transport of a real run, over a SuperLink whose calls may be slow, hang or fail.

Each request is sent, and each reply fetched, in its own thread: one that hangs delays neither the others nor the end of a round
or of the process.
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
from cotune.reporting.documents.events import ConnectionLost, ConnectionRestored, Event, OrganizationLeft
from cotune.server.request_outcomes import Lost, Rejected
from cotune.server.time_limits import TIME_LIMITS, TimeLimits
from cotune.server.transport.base import Reply
from cotune.server.transport.node_registry import Node, NodeRegistry

_POLL_GROWTH = 0.05  # interval between polls, as a fraction of the time without a reply, which bounds the relative delay
_MAX_REPLIES = 4  # being fetched or waiting to be read at a time; each is as large as the model
_LOST = (3, 4, 5)  # Flower's error codes for a message, a reply or a node that is unavailable

Report = Callable[[Event], None]


@dataclass(eq=False)
class _SentRequest:
    """A request that has not been answered.

    Attributes:
        round: Its round.
        organization: Its recipient.
        max_bytes: Size of the largest reply that is accepted.
        fetching_since: When fetching its reply started; None: there is no reply yet; infinite once fetching was found slow.
        last_chunk: When the last chunk of the reply arrived.
    """

    round: int
    organization: str
    max_bytes: int
    fetching_since: float | None = None
    last_chunk: float = 0.0

    def note_chunk(self) -> None:
        """Record that a chunk of the reply has arrived."""
        self.last_chunk = time.monotonic()


class _SendLock:
    """Lets one thread send at a time, so that the SuperLink receives once what several requests share.

    A thread that hangs gives way to one other thread, not to all at once.
    """

    def __init__(self, held_up: float) -> None:
        """Create the lock.

        Args:
            held_up: Seconds after which the next thread may send although the last one has not finished.
        """
        self._held_up = held_up
        self._free = threading.Condition()
        self._holder: object | None = None
        self._since = 0.0

    @contextmanager
    def acquired(self) -> Iterator[None]:
        """Wait for the turn of this thread, and keep it during the block."""
        ours = object()
        with self._free:
            while self._holder and (left := self._since + self._held_up - time.monotonic()) > 0:
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
    """Sends and fetches in daemon threads, which never keep the process alive (see `base.Transport`)."""

    def __init__(self, line: RuntimeClient, nodes: NodeRegistry, report: Report, limits: TimeLimits = TIME_LIMITS) -> None:
        """Start the threads that check connections and poll for replies.

        Args:
            line: The connection to the SuperLink.
            nodes: Maps nodes to organizations.
            report: Called with events of the connection.
            limits: Intervals of checks and polls, and timeouts.
        """
        self._line = line
        self._limits = limits
        self._nodes = nodes
        self._report = report
        self._replies: SimpleQueue[tuple[Reply, bool]] = SimpleQueue()  # (a reply, whether it occupies a slot)
        self._slots = threading.Semaphore(_MAX_REPLIES)
        self._send_lock = _SendLock(limits.held_up)
        self._sent: dict[str, _SentRequest] = {}  # Flower's message id -> request
        self._closed = threading.Event()
        self._stopped = threading.Event()
        self._found: Mapping[str, Node] = {}
        self._reported_left: frozenset[str] = frozenset()
        self._last_seen = 0.0
        self._began = time.monotonic()
        self._failure = ""
        self._away = False
        self._active = time.monotonic()  # when the last request was delivered, or the last reply found
        # how often all replies (returns), and those of one organization (doubts), may have been lost in transfer
        self._returns = 0
        self._doubts = Counter[str]()
        self._threads: list[threading.Thread] = []
        self._start("watch", self._watch)
        self._start("collect", self._collect)

    def _start(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._run_until_stopped, args=(work, *arguments), name=f"cotune-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run_until_stopped(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except RunStopped:
            self._stopped.set()

    def connected(self) -> Mapping[str, Node]:
        """Return organization -> node of those that are connected.

        A node whose reply may be lost counts as reconnected, so that it is asked again: Flower delivers each reply only once.
        """
        self._check()
        lost = {name: self._returns + self._doubts[name] for name in self._found}
        return {name: replace(node, since=f"{node.since} {lost[name]}") for name, node in self._found.items()}

    def last_seen(self) -> float:
        """Return the time of the last successful check (monotonic clock); 0 if there was none."""
        return self._last_seen

    def left(self) -> frozenset[str]:
        """Return the organizations that had left voluntarily at the last check."""
        return self._nodes.left()

    def revoked(self) -> frozenset[str]:
        """Return the organizations whose invitation was revoked at the last check."""
        return self._nodes.revoked()

    def _watch(self) -> None:
        refused = False
        while not self._closed.is_set():
            try:
                started = time.monotonic()
                self._found = self._nodes.connected()
                if self._last_seen and (refused or time.monotonic() - self._last_seen > self._limits.away):
                    self._returns += 1
                self._last_seen = started
                self._failure = ""
                refused = False
                self._doubt_the_slow()
            except RunStopped:
                raise
            except Exception as error:
                self._failure = _describe(error)
                refused = refused or isinstance(error, httpx.ConnectError)
            self._closed.wait(self._limits.watch)

    def _doubt_the_slow(self) -> None:
        for sent in list(self._sent.values()):
            if (
                sent.fetching_since is not None
                and time.monotonic() - max(sent.fetching_since, sent.last_chunk) > self._limits.slow
            ):
                sent.fetching_since = math.inf  # once
                self._doubts[sent.organization] += 1

    def _check(self) -> None:
        """Report if the connection was lost or restored; raises RunError if the run was stopped at the SuperLink."""
        if self._stopped.is_set():
            raise RunError(
                "the run was stopped at the SuperLink: expected it to go on; continue it with --resume",
                code="run.stopped_at_superlink",
            )
        away = time.monotonic() - max(self._last_seen, self._began) > self._limits.silent
        if away and not self._away:
            self._report(
                ConnectionLost(reason=self._failure or f"the SuperLink has not answered for {self._limits.silent:g} seconds")
            )
        elif self._away and not away:
            self._report(ConnectionRestored())
        self._away = away
        self._report_left()

    def _report_left(self) -> None:
        left = self.left()
        before = self._reported_left
        self._reported_left = left
        for name in sorted(left - before):
            self._report(OrganizationLeft(organization=name))

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        """Send a request in its own thread; see `Transport.send`."""
        self._start(organization, self._push, _SentRequest(round, organization, max_bytes), message)

    def _push(self, sent: _SentRequest, message: Message) -> None:
        """Send a request, one after the other, so that objects that several requests share are sent once."""
        try:
            with self._send_lock.acquired():
                if self._closed.is_set():
                    return
                number = self._line.push(message)
        except RunStopped:
            raise
        except Exception as error:
            return self._report_lost(sent, f"its request could not be handed over: {_describe(error)}")
        if not number:
            return self._report_lost(sent, "the SuperLink did not take its request")
        self._sent[number] = sent
        self._active = time.monotonic()

    def _report_lost(self, sent: _SentRequest, reason: str) -> None:
        self._replies.put((Reply(sent.round, sent.organization, Lost(reason)), False))

    def _collect(self) -> None:
        wait = self._limits.poll
        while not self._closed.wait(wait):
            waiting = [(number, sent) for number, sent in list(self._sent.items()) if sent.fetching_since is None]
            some = [dict(waiting[first : first + _MAX_REPLIES]) for first in range(0, len(waiting), _MAX_REPLIES)]
            answered = [self._look(few) for few in some]
            wait = self._pause() if all(answered) else min(self._limits.look_backoff, 2 * wait)

    def _pause(self) -> float:
        """Return the seconds until the next poll: a SuperLink answers about thirty calls per second, of all clients together."""
        return min(self._limits.max_poll, max(self._limits.poll, _POLL_GROWTH * (time.monotonic() - self._active)))

    def _look(self, waiting: Mapping[str, _SentRequest]) -> bool:
        """Poll for replies, and start to fetch those that are found; return whether the SuperLink answered.

        Only a few requests are polled at a time, as a call that times out loses all replies that it would have announced. If a
        call fails, its requests are polled one by one, so that one of them does not hide the replies to the others.
        """
        try:
            found = self._line.list_replies(list(waiting))
        except RunStopped:
            raise
        except Exception as error:  # the SuperLink is busy or starting; `_watch` reports it
            if isinstance(error, httpx.HTTPStatusError) and len(waiting) > 1:
                looked = [self._look({number: sent}) for number, sent in waiting.items()]
                return any(looked)
            if _may_be_gone(error):
                self._doubts.update(sent.organization for sent in waiting.values())
            return False
        for number in found.keys() & waiting.keys():
            self._active = time.monotonic()
            waiting[number].fetching_since = self._active
            self._start(waiting[number].organization, self._fetch, number, waiting[number], found[number])
        return True

    def _fetch(self, number: str, sent: _SentRequest, answer: Any) -> None:
        held = self._slots.acquire(timeout=self._limits.held_up)
        try:
            reply = self._fetch_reply(sent, answer)
            if reply is None:
                sent.fetching_since = None
            else:
                self._sent.pop(number, None)
                self._replies.put((reply, held))
                held = False
        finally:
            if held:
                self._slots.release()

    def _fetch_reply(self, sent: _SentRequest, answer: Any) -> Reply | None:
        """Fetch a reply; return None if it has to be polled for again."""
        content: Message | Lost | Rejected | None
        try:
            content = self._line.fetch(answer, sent.max_bytes, sent.note_chunk)
        except RunStopped:
            raise
        except (TooLarge, Malformed) as error:
            content = Rejected(str(error))
        except Aborted as error:
            content = Lost(f"its answer was cut off: {error}")
        except Exception as error:
            self._doubts[sent.organization] += _may_be_gone(error)
            return None
        if isinstance(content, Message) and content.has_error() and content.error.code in _LOST:
            content = Lost("it has left, or its machine or network is gone; it is asked again when it comes back")
        return None if content is None else Reply(sent.round, sent.organization, content)

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        """Yield replies; asking for the next one frees the slot of the last. See `Transport.receive`."""
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
                    self._slots.release()

    def _settle(self, round: int, organization: str) -> None:
        """Stop waiting for replies to other copies of a request that was answered."""
        for number, sent in list(self._sent.items()):
            if (sent.round, sent.organization) == (round, organization):
                self._sent.pop(number, None)

    def forget(self, round: int) -> None:
        """Drop all further replies to this round and earlier ones."""
        for number, sent in list(self._sent.items()):
            if sent.round <= round:
                self._sent.pop(number, None)

    def close(self) -> None:
        """Stop the threads; those that hang end with the process."""
        self._closed.set()
        self._sent.clear()
        deadline = time.monotonic() + self._limits.close
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _may_be_gone(error: Exception) -> bool:
    """Return whether a failed call may have delivered, and thereby lost, a reply: not if it never arrived or was refused."""
    if isinstance(error, httpx.HTTPStatusError):
        return not error.request.url.path.endswith("/pull-messages")
    return not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)


def _describe(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
