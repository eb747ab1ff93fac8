"""One round's asking: who is asked, asked again, waited for, and when the round is over.

A round begins when as many organisations are connected as its quorum needs. It is over when everybody has answered, or enough
have; when the quorum stands and those who are missing have stayed away for `server.absent_seconds`; when the quorum cannot be
reached any more; and at the latest `server.deadline_seconds` after it began. In a real run nobody is waited for much longer than
the others took: once the quorum and half of those who are asked have answered, whoever has had `server.patience` times their
median, and `server.least_seconds`, has timed out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from flwr.app import Message, MessageType, RecordDict

from cotune.models.errors import RunError
from cotune.plan.schema import RoundsConfig
from cotune.server.addresses import Node
from cotune.server.post import Letter, Post
from cotune.server.tally import Tally
from cotune.strategies.wire import payload_bytes

__all__ = ["Asking"]

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 10.0  # for the first look at who is connected, however short the wait
_MOST_LOSSES = 3  # of an organisation in a round
_MOST_REQUESTS = 10  # to it: it may connect anew again and again
_AGAIN_SECONDS = 2.0  # before a lost one is asked again, and twice as long after the second loss
_LATEST = "the round was complete before it answered"

Tell = Callable[..., None]


@dataclass
class _Lost:
    reason: str
    at: float


class Asking:
    """contents: organisation -> its request, in the order of the organisations. most_bytes: of an answer. enough: updates that
    close the round. real: whether organizations work side by side, so that their times can be compared. clock: seconds.
    """

    def __init__(
        self,
        post: Post,
        config: RoundsConfig,
        round: int,
        contents: Mapping[str, RecordDict],
        most_bytes: int,
        enough: int,
        tally: Tally,
        tell: Tell,
        *,
        real: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._real, self._clock = real, clock
        self._asked_at: dict[str, float] = {}
        self._took: dict[str, float] = {}  # seconds, of those who have answered
        self._post, self._config, self._round, self._tally, self._tell = post, config, round, tally, tell
        self._contents, self._most_bytes, self._enough = dict(contents), most_bytes, enough
        self._times, self._losses = dict.fromkeys(contents, 0), dict.fromkeys(contents, 0)  # requests to each; lost ones
        self._idle = dict.fromkeys(contents)  # who has not answered for good, and is to be asked
        self._waiting: Counter[str] = Counter()  # who is asked and may answer yet -> how many requests are under way
        self._lost: dict[str, _Lost] = {}
        self._since: dict[str, str] = {}  # when those who are asked had connected
        self._looked = 0.0
        self._began = clock()

    def letters(self) -> Iterator[Letter]:
        """The answers as they come, also those of earlier rounds; letters of this round have a reply each. Whoever sent none is
        in the tally's `dropped` at the end. Raises RunError when too few are connected for too long.
        """
        self._await_quorum()
        self._began = self._clock()
        while not self._over():
            last = self._seconds_left() <= 0
            self._ask()
            self._ask_again()
            self._give_up()
            for letter in self._post.receive(_POLL_SECONDS, last=last):
                if self._settles(letter):
                    yield letter
                del letter
                if self._complete:
                    break
            if last:
                break
        self._close()

    def _await_quorum(self) -> None:
        people, needed, told = list(self._contents), self._tally.needed, None
        while len(here := self._connected(people)) < needed:
            if told != here and self._post.looked():
                told = here
                self._tell("waiting", round=self._round, connected=here, needed=needed, absent=_without(people, here))
            waited = self._clock() - self._began
            if waited > self._config.wait_seconds and (self._post.looked() or waited > _LOOK_SECONDS):
                raise RunError(
                    f"round {self._round} has {len(here)} of {len(people)} organisations connected after"
                    f" {self._config.wait_seconds:g} seconds, expected at least {needed} (server.quorum); not there:"
                    f" {', '.join(_without(people, here))[:500]}"
                )
            time.sleep(min(_POLL_SECONDS, 0.02))

    def _connected(self, people: list[str]) -> list[str]:
        connected = self._post.connected()
        return [name for name in people if name in connected]

    def _ask(self) -> None:
        """Whoever is connected, and was not asked or was lost."""
        ready = [name for name in self._idle if self._may_be_asked(name)]
        connected = self._post.connected() if ready else {}
        for name in ready:
            if name in connected:
                del self._idle[name]
                self._send(name, connected[name])

    def _ask_again(self) -> None:
        """Whoever has connected anew since it was asked: its request may be lost, as Flower hands each over once."""
        if self._post.looked() == self._looked:
            return
        self._looked = self._post.looked()
        for name, node in self._post.connected().items():
            if name in self._waiting and node.since != self._since[name] and self._times[name] < _MOST_REQUESTS:
                self._send(name, node)

    def _send(self, name: str, node: Node) -> None:
        self._times[name] += 1
        self._waiting[name] += 1
        self._since[name], self._asked_at[name] = node.since, self._clock()
        self._tally.bytes_down += payload_bytes(self._contents[name])
        self._post.send(self._round, name, self._message(name, node.id), self._most_bytes)

    def _may_be_asked(self, name: str) -> bool:
        if name not in self._lost:
            return True
        again = self._lost[name].at + _AGAIN_SECONDS * 2 ** (self._losses[name] - 1)
        return self._clock() >= again and self._post.looked() > self._lost[name].at

    def _message(self, name: str, node: int) -> Message:
        seconds = max(1.0, self._seconds_left())
        if self._config.late == "fold":
            seconds += self._config.max_staleness * self._config.deadline_seconds
        return Message(self._contents[name], node, MessageType.TRAIN, ttl=seconds, group_id=str(self._round))

    def _settles(self, letter: Letter) -> bool:
        """Whether the letter is an answer; one of an organisation that was lost is noted here."""
        name = letter.organisation
        if letter.round != self._round:
            return letter.answers
        if name not in self._contents:
            return False  # it was asked twice, and has answered
        if letter.answers:
            self._took[name] = self._clock() - self._asked_at[name]
            self._answered(name)
            return True
        self._waiting -= Counter([name])
        if name in self._waiting:
            return False  # it was asked twice, and may answer the other request
        self._idle[name], self._lost[name] = None, _Lost(letter.lost, self._clock())
        self._losses[name] += 1
        if self._losses[name] >= _MOST_LOSSES or self._times[name] >= _MOST_REQUESTS:
            self._drop(name, f"{letter.lost}, {self._losses[name]} times")
        return False

    def _answered(self, name: str) -> None:
        self._idle.pop(name, None)
        self._contents.pop(name, None)
        self._waiting.pop(name, None)

    def _give_up(self) -> None:
        """Whoever has had enough time, by that of the others; the deadline itself comes after all that has arrived is taken."""
        seconds = self._patience()
        if seconds >= self._config.deadline_seconds:
            return
        for name in [n for n in self._times if n in self._waiting and self._clock() - self._asked_at[n] >= seconds]:
            self._time_out(name, seconds)

    def _patience(self) -> float:
        """Seconds for one request. The median of those whose updates were admitted is no single one's to choose."""
        config, came = self._config, self._tally.participants
        if not (self._real and config.patience and self._half_came and self._tally.has_quorum):
            return config.deadline_seconds
        usual = median(self._took[name] for name in came)
        return min(config.deadline_seconds, max(config.least_seconds, config.patience * usual))

    @property
    def _half_came(self) -> bool:
        """Where fewer answer, the fault may be the coordinator's own."""
        return 2 * len(self._tally.participants) >= len(self._tally.people)

    def _time_out(self, name: str, seconds: float) -> None:
        if self._real and self._half_came:
            self._tally.timed_out.append(name)
        self._drop(name, f"no reply within {seconds:g} seconds")

    def _drop(self, name: str, reason: str) -> None:
        self._answered(name)
        self._tally.dropped[name] = reason
        self._tell("update_dropped", round=self._round, organisation=name, reason=reason)

    @property
    def _complete(self) -> bool:
        return len(self._tally.participants) >= self._enough

    def _seconds_left(self) -> float:
        return self._began + self._config.deadline_seconds - self._clock()

    def _over(self) -> bool:
        admitted, needed = len(self._tally.participants), self._tally.needed
        if self._complete:
            return True
        if self._waiting:
            return False
        if not self._idle or admitted + len(self._idle) < needed:
            return True
        if not self._tally.has_quorum:
            return False
        since = max([self._began, *(self._lost[name].at for name in self._idle if name in self._lost)])
        return self._clock() - since >= self._config.absent_seconds

    def _close(self) -> None:
        """Whoever is still missing is shown, with the reason."""
        for name in [name for name in self._times if name in self._waiting]:
            if self._complete:
                self._drop(name, _LATEST)
            else:
                self._time_out(name, self._config.deadline_seconds)
        for name in list(self._idle):
            if name in self._lost or not self._complete:
                self._tally.absent.append(name)
                self._drop(name, self._lost[name].reason if name in self._lost else "it was not connected")
            else:
                self._drop(name, _LATEST)


def _without(people: list[str], here: list[str]) -> list[str]:
    return [name for name in people if name not in here]
