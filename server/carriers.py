"""The post of a real run: a grid whose calls may be slow, hang or fail.

Every organisation's request is carried by a thread of its own, so that whoever hangs holds up nobody else, nor the end of a round
or of the process.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from cotune.models.errors import RunError
from cotune.server.addresses import Addresses, Node, addresses_of
from cotune.server.post import Direct, Letter, Post, fetched
from cotune.server.run_folder import RunFolder

__all__ = ["Threaded", "post_of"]

_WATCH_SECONDS = 0.5  # between two looks at who is connected
_SILENT_SECONDS = 10.0  # a SuperLink that has answered nothing for so long is out of reach: its client itself retries for ever
_POLL_SECONDS = 0.1  # between two looks for one answer; with many organisations longer
_POLLS_PER_SECOND = 50.0  # of all organisations together
_LONGEST_WAIT_SECONDS = 10.0  # before a call that failed is made again
_AWAY_SECONDS = 5.0  # without an answer from the SuperLink: whatever it was handing over then may be lost
_SLOW_SECONDS = 20.0  # to fetch an answer: it may have been cut off while it was sent, and Flower waits for the rest for 190 s
_AT_A_TIME = 4  # answers that are fetched, or wait to be added: each is as large as the model
_HELD_UP_SECONDS = 5.0  # who hangs for so long holds up nobody else any more
_CLOSE_SECONDS = 1.0  # a call after the end of a run would be refused, and Flower ends the process then
_LOST = (3, 4, 5)  # Flower's error codes for a message, a reply or a node that is gone

Tell = Callable[..., None]


def post_of(grid: Grid, folder: RunFolder) -> Post:
    addresses = addresses_of(grid, folder)
    return Threaded(grid, addresses, folder.events.tell) if folder.file.federation else Direct(grid, addresses)


class Threaded:
    """In threads of its own, which end with the process however they hang."""

    def __init__(self, grid: Grid, addresses: Addresses, tell: Tell) -> None:
        self._grid, self._addresses, self._tell = grid, addresses, tell
        self._letters: SimpleQueue[tuple[Letter, bool]] = SimpleQueue()  # whether it is one of those at a time
        self._hands = threading.Semaphore(_AT_A_TIME)
        self._under_way: dict[tuple[int, str], threading.Event] = {}
        self._fetching: dict[tuple[str, str], float] = {}  # whose answer to which request -> since when
        self._closed, self._stopped = threading.Event(), threading.Event()
        self._found: Mapping[str, Node] = {}
        self._looked, self._began, self._failure, self._away = 0.0, time.monotonic(), "", False
        self._returns, self._doubts = 0, Counter[str]()  # times that all answers, and one's, may have been lost on the way
        self._threads: list[threading.Thread] = []
        self._start("watch", self._watch)

    def _start(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=work, args=arguments, name=f"cotune-{name}", daemon=True))
        self._threads[-1].start()

    def connected(self) -> Mapping[str, Node]:
        """Whose answer may have been lost on the way counts as connected anew: Flower hands over each answer only once."""
        self._check()
        lost = {name: self._returns + self._doubts[name] for name in self._found}
        return {name: replace(node, since=f"{node.since} {lost[name]}") for name, node in self._found.items()}

    def looked(self) -> float:
        return self._looked

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                started = time.monotonic()
                self._found = self._addresses.connected()
                if self._looked and time.monotonic() - self._looked > _AWAY_SECONDS:
                    self._returns += 1
                self._looked, self._failure = started, ""
                self._doubt_the_slow()
            except RunNotRunningException:
                self._stopped.set()
                return
            except Exception as error:
                self._failure = _words(error)
            self._closed.wait(_WATCH_SECONDS)

    def _doubt_the_slow(self) -> None:
        for key, since in list(self._fetching.items()):
            if time.monotonic() - since > _SLOW_SECONDS:
                self._fetching[key] = math.inf  # once
                self._doubts[key[0]] += 1

    def _check(self) -> None:
        """Tells when the connection is lost, or back. Raises RunError when the run was stopped."""
        if self._stopped.is_set():
            raise RunError("the run was stopped at the SuperLink: expected it to go on; continue it with --resume")
        away = time.monotonic() - max(self._looked, self._began) > _SILENT_SECONDS
        if away and not self._away:
            self._tell(
                "connection_lost", reason=self._failure or f"the SuperLink has not answered for {_SILENT_SECONDS:g} seconds"
            )
        elif self._away and not away:
            self._tell("connection_back")
        self._away = away

    def send(self, round: int, organisation: str, message: Message) -> None:
        over = self._under_way.setdefault((round, organisation), threading.Event())
        self._start(organisation, self._carry, round, organisation, message, over)

    def _carry(self, round: int, organisation: str, message: Message, over: threading.Event) -> None:
        held = False
        try:
            numbers = list(self._grid.push_messages([message]))
            del message
            if numbers and numbers[0]:
                letter, held = self._answer(round, organisation, numbers[0], over)
            else:
                letter = Letter(round, organisation, None, "the SuperLink did not take its request")
        except RunNotRunningException:
            self._stopped.set()
            return
        except Exception as error:
            letter = Letter(round, organisation, None, f"its request could not be handed over: {_words(error)}")
        self._letters.put((letter, held))

    def _answer(self, round: int, organisation: str, number: str, over: threading.Event) -> tuple[Letter, bool]:
        wait = 0.0
        while not over.wait(wait):
            held = self._hands.acquire(timeout=_HELD_UP_SECONDS)
            try:
                self._fetching[organisation, number] = time.monotonic()
                reply = fetched(self._grid, number)
                if reply is not None:
                    kept, held = held, False
                    return _letter(round, organisation, reply), kept
                wait = max(_POLL_SECONDS, len(self._under_way) / _POLLS_PER_SECOND)
            except Exception as error:  # the SuperLink is busy, or starting; `_watch` tells of it
                self._doubts[organisation] += _may_be_gone(error)
                wait = min(_LONGEST_WAIT_SECONDS, max(_POLL_SECONDS, 2 * wait))
            finally:
                self._fetching.pop((organisation, number), None)
                if held:
                    self._hands.release()
        return Letter(round, organisation, None, "the round was over"), False

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Letter]:
        wait = 0.0 if last else seconds
        while True:
            self._check()
            try:
                letter, held = self._letters.get(timeout=wait) if wait else self._letters.get_nowait()
            except Empty:
                return
            wait = 0.0
            if letter.reply is not None and (letter.round, letter.organisation) in self._under_way:
                self._under_way.pop((letter.round, letter.organisation)).set()
            try:
                yield letter
            finally:
                del letter
                if held:
                    self._hands.release()

    def forget(self, round: int) -> None:
        for key in [key for key in list(self._under_way) if key[0] <= round]:
            self._under_way.pop(key).set()

    def close(self) -> None:
        """Ends the threads, but for those that hang: they end with the process."""
        self._closed.set()
        self.forget(max((round for round, _ in self._under_way), default=0))
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _letter(round: int, organisation: str, reply: Message) -> Letter:
    if reply.has_error() and reply.error.code in _LOST:
        return Letter(round, organisation, None, f"its node was lost (error {reply.error.code})")
    return Letter(round, organisation, reply)


def _may_be_gone(error: Exception) -> bool:
    """Whether an answer had been handed over when a call failed: not where it was the call that asks for it."""
    return not (isinstance(error, httpx.HTTPStatusError) and error.request.url.path.endswith("/pull-messages"))


def _words(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
