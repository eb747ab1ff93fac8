"""One round's asking: who is asked, asked again, waited for, and when the round is over.

A round begins when as many organizations are connected as its quorum needs. It is over when everybody has answered, or enough
have; when the quorum stands and those who are missing have stayed away for `server.absent_seconds`; when the quorum cannot be
reached any more; and at the latest `server.deadline_seconds` after it began. In a real run nobody is waited for much longer than
the others took: once the quorum and half of those who are asked have answered, anyone who has had `server.patience` times their
median, and `server.least_seconds`, has timed out.

Where nobody has approved the plan yet, the organization is asked again. The round does not wait for it once the
quorum stands, and otherwise for at most `server.approval_seconds`: from then on it is asked again only while somebody else is
waited for, so that two that take turns do not keep a round from ending. Anyone who is revoked is not waited for at all.

Organizations at which nobody has approved the plan yet: no failure, and no strike. They are asked again, with back-off.

An organization that connects anew is asked at once: anyone who joins with a new federation.toml has approved its plan.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median_high

from flwr.app import Message, MessageType, RecordDict

from cotune.errors import Declined, RunError
from cotune.plan.tables import RoundsConfig
from cotune.protocol.messages import payload_bytes
from cotune.protocol.signatures import parse_refusal
from cotune.server.rounds.round_result import RoundResult
from cotune.server.transport.base import Reply, Transport
from cotune.server.transport.node_registry import LEFT, REVOKED, Node

NOT_APPROVED = "nobody there has approved the plan yet; it is asked again, and joins once somebody has"
_SAID = Declined("training.approval", "").public
# before it is asked again; doubled each time
_FIRST_SECONDS = 5.0
_LONGEST_SECONDS = 300.0


def awaits_approval(reply: Message | None) -> bool:
    """Whether an answer says that the plan has to be approved by a person first, and nothing else."""
    return reply is not None and reply.has_error() and parse_refusal(reply.error.reason or "")[0] == _SAID


@dataclass
class _Pending:
    at: float
    since: str
    times: int = 1


class Approvals:
    """Of one round. Times are in seconds by one clock, which never jumps."""

    def __init__(self) -> None:
        self._pending: dict[str, _Pending] = {}
        self._began: float | None = None

    def note(self, organization: str, at: float, since: str) -> bool:
        """That it has said so. since: when it had connected. Returns whether that is news."""
        before = self._pending.get(organization)
        self._pending[organization] = _Pending(at, since, before.times + 1 if before else 1)
        if self._began is None:
            self._began = at
        return before is None

    def settle(self, organization: str) -> bool:
        """That it has given another answer. Returns whether it had been waited for."""
        return self._pending.pop(organization, None) is not None

    def __contains__(self, organization: object) -> bool:
        return organization in self._pending

    def names(self) -> list[str]:
        return sorted(self._pending)

    def is_due(self, organization: str, now: float, since: str) -> bool:
        """Whether it is to be asked again. since: when it connected last."""
        pending = self._pending[organization]
        wait = _FIRST_SECONDS if since != pending.since else _wait(pending.times)
        return now >= pending.at + wait

    def end(self, seconds: float) -> float:
        """Until when a round waits for them, at most so long after the first of them was asked; at once where there is none."""
        return self._began + seconds if self._pending and self._began is not None else 0.0


def _wait(times: int) -> float:
    return min(_LONGEST_SECONDS, _FIRST_SECONDS * 2.0 ** min(times - 1, 20))


_POLL_SECONDS = 0.1
_LOOK_SECONDS = 10.0  # for the first look at who is connected, however short the wait
_MOST_LOSSES = 3  # of an organization in a round
_MOST_REQUESTS = 10  # to it: it may connect anew again and again
_AGAIN_SECONDS = 2.0  # before a lost one is asked again, and twice as long after the second loss
_LATEST = "the round was complete before it answered"

Tell = Callable[..., None]


@dataclass
class _Lost:
    reason: str
    at: float


class RequestTracker:
    """contents: organization -> its request, in the order of the organizations. max_bytes: of an answer. enough: updates that
    close the round. real: whether organizations work side by side, so that their times can be compared. fuses: whether a round
    needs several updates. clock: seconds.
    """

    def __init__(
        self,
        post: Transport,
        config: RoundsConfig,
        round: int,
        contents: Mapping[str, RecordDict],
        max_bytes: int,
        enough: int,
        round_result: RoundResult,
        tell: Tell,
        *,
        real: bool = False,
        fuses: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._real = real
        self._fuses = fuses
        self._clock = clock
        self._left = len(contents)  # who may take part
        self._asked_at: dict[str, float] = {}
        self._took: dict[str, float] = {}  # seconds, of those who have answered
        self._post = post
        self._config = config
        self._round = round
        self._result = round_result
        self._tell = tell
        self._contents = dict(contents)
        self._most_bytes = max_bytes
        self._enough = enough
        # requests to each; lost ones
        self._times = dict.fromkeys(contents, 0)
        self._losses = dict.fromkeys(contents, 0)
        self._idle = dict.fromkeys(contents)  # who has not answered for good, and is to be asked
        self._waiting: Counter[str] = Counter()  # who is asked and may answer yet -> how many requests are under way
        self._lost: dict[str, _Lost] = {}
        self._approvals = Approvals()
        self._ends: dict[str, float] = {}  # until when those are waited for that were asked again for want of an approval
        self._since: dict[str, str] = {}  # when those who are asked had connected
        self._looked = 0.0
        self._began = clock()

    def letters(self) -> Iterator[Reply]:
        """The answers as they come, also those of earlier rounds; letters of this round have a reply each. Anyone who sent none
        is
        in the round_result's `dropped` at the end. One whose plan is not approved yet sends several. Raises RunError when too few
        are
        connected for too long.
        """
        self._await_quorum()
        self._began = self._clock()
        while not self._over():
            last = self._seconds_left() <= 0
            self._drop_revoked()
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

    def is_waited_for(self, letter: Reply) -> bool:
        """Whether a letter of this round was no last word: its sender is asked again."""
        return letter.organization in self._approvals

    def _await_quorum(self) -> None:
        people = list(self._contents)
        told = None
        while len(here := self._connected(people)) < (needed := self._result.needed):
            if told != here and self._post.looked():
                told = here
                self._tell("waiting", round=self._round, connected=here, needed=needed, absent=_without(people, here))
            self._drop_revoked()
            if len(self._contents) < self._result.needed:
                return  # too few may take part any more
            waited = self._clock() - self._began
            if waited > self._config.wait_seconds and (self._post.looked() or waited > _LOOK_SECONDS):
                raise RunError(
                    f"round {self._round} has {len(here)} of {len(people)} organizations connected after"
                    f" {self._config.wait_seconds:g} seconds, expected at least {needed} (server.quorum); not there:"
                    f" {', '.join(_without(people, here))[:500]}"
                )
            time.sleep(min(_POLL_SECONDS, 0.02))

    def _connected(self, people: list[str]) -> list[str]:
        connected = self._post.connected()
        return [name for name in people if name in connected]

    def _ask(self) -> None:
        """Anyone who is connected, and was not asked or was lost."""
        connected = self._post.connected() if self._idle else {}
        for name in [name for name in self._idle if name in connected and self._may_be_asked(name, connected[name])]:
            del self._idle[name]
            self._send(name, connected[name])

    def _ask_again(self) -> None:
        """Anyone who has connected anew since it was asked: its request may be lost, as Flower hands each over once."""
        if self._post.looked() == self._looked:
            return
        self._looked = self._post.looked()
        for name, node in self._post.connected().items():
            if name in self._waiting and node.since != self._since[name] and self._times[name] < _MOST_REQUESTS:
                self._send(name, node)

    def _send(self, name: str, node: Node) -> None:
        self._times[name] += 1
        self._waiting[name] += 1
        self._since[name] = node.since
        self._asked_at[name] = self._clock()
        if name in self._approvals:
            self._ends[name] = self._clock() + self._config.deadline_seconds
        self._result.bytes_down += payload_bytes(self._contents[name])
        self._post.send(self._round, name, self._message(name, node.id), self._most_bytes)

    def _may_be_asked(self, name: str, node: Node) -> bool:
        if name in self._approvals and not self._waits_for_approvals:
            return False
        if name not in self._lost:
            return name not in self._approvals or self._approvals.is_due(name, self._clock(), node.since)
        again = self._lost[name].at + _AGAIN_SECONDS * 2 ** (self._losses[name] - 1)
        return self._clock() >= again and self._post.looked() > self._lost[name].at

    def _message(self, name: str, node: int) -> Message:
        seconds = max(1.0, self._end_of(name) - self._clock())
        if self._config.late == "fold":
            seconds += self._config.max_staleness * self._config.deadline_seconds
        return Message(self._contents[name], node, MessageType.TRAIN, ttl=seconds, group_id=str(self._round))

    def _settles(self, letter: Reply) -> bool:
        """Whether the letter is an answer; one of an organization that was lost is noted here."""
        name = letter.organization
        if letter.round != self._round:
            return letter.answers
        if name not in self._contents:
            return False  # it was asked twice, and has answered
        if self._real and awaits_approval(letter.reply):
            self._await_approval(name)
            return True
        if letter.answers:
            self._took[name] = self._clock() - self._asked_at[name]
            self._answered(name)
            return True
        self._waiting -= Counter([name])
        if name in self._waiting:
            return False  # it was asked twice, and may answer the other request
        self._idle[name] = None
        self._lost[name] = _Lost(letter.lost, self._clock())
        self._losses[name] += 1
        if self._losses[name] >= _MOST_LOSSES or self._times[name] >= _MOST_REQUESTS:
            self._drop(name, f"{letter.lost}, {self._losses[name]} times")
        return False

    def _await_approval(self, name: str) -> None:
        """What it was asked before counts no more: it may take days until it is asked for the last time."""
        self._waiting.pop(name, None)
        self._lost.pop(name, None)
        self._times[name] = self._losses[name] = 0
        self._idle[name] = None
        if self._approvals.note(name, self._clock(), self._since[name]):
            self._tell_of_approvals()

    def _tell_of_approvals(self) -> None:
        self._tell("awaiting_approval", round=self._round, organizations=self._approvals.names())

    def _answered(self, name: str) -> None:
        if self._approvals.settle(name):
            self._tell_of_approvals()
        self._idle.pop(name, None)
        self._contents.pop(name, None)
        self._waiting.pop(name, None)

    def _give_up(self) -> None:
        """Anyone who has had enough time, by that of the others; the deadline itself comes after all that has arrived is taken,
        unless the round waits for approvals beyond it.
        """
        seconds = self._patience()
        deadline = self._config.deadline_seconds
        for name in [name for name in self._times if name in self._waiting]:
            if seconds < deadline and self._clock() - self._asked_at[name] >= seconds:
                self._time_out(name, seconds)
            elif self._clock() >= self._end_of(name) and self._seconds_left() > 0:
                self._time_out(name, deadline)

    def _patience(self) -> float:
        """Seconds for one request. The median of those whose updates were admitted, of two in the middle the slower: no single
        one can make it shorter than an honest one took.
        """
        config = self._config
        came = self._result.participants
        if not (self._real and config.patience and self._half_came and self._result.has_quorum):
            return config.deadline_seconds
        return config.enough_seconds(median_high(self._took[name] for name in came), config.deadline_seconds)

    @property
    def _given_up(self) -> int:
        """How many nobody waits for any more, as no person has approved the plan in all that time."""
        return len(self._approvals.names()) if self._approvals_over else 0

    @property
    def _approvals_over(self) -> bool:
        return self._clock() >= self._approvals.end(self._config.approval_seconds)

    @property
    def _waits_for_approvals(self) -> bool:
        """Whether the round goes on while people look at the plan: for their sake, or for that of somebody who trains."""
        others = any(name not in self._approvals for name in self._waiting)
        return others or not (self._result.has_quorum or self._approvals_over)

    @property
    def _half_came(self) -> bool:
        """Where fewer answer, the fault may be the coordinator's own."""
        return 2 * len(self._result.participants) >= len(self._result.people)

    def _time_out(self, name: str, seconds: float) -> None:
        if self._real and self._half_came:
            self._result.timed_out.append(name)
        self._drop(name, f"no reply within {seconds:g} seconds")

    def _drop_revoked(self) -> None:
        """The quorum is then of the others."""
        revoked = self._post.revoked()
        for name in [name for name in self._contents if name in revoked]:
            self._drop(name, REVOKED)
            self._left -= 1
            needed = self._config.needed(min(self._enough, self._left), fuses=self._fuses) if self._left else 1
            self._result.needed = min(self._result.needed, needed)

    def _drop(self, name: str, reason: str) -> None:
        self._answered(name)
        self._result.dropped[name] = reason
        self._tell("update_dropped", round=self._round, organization=name, reason=reason)

    @property
    def _complete(self) -> bool:
        return len(self._result.participants) >= self._enough

    def _end_of(self, name: str) -> float:
        """Until when its answer is waited for."""
        return self._ends.get(name, self._began + self._config.deadline_seconds)

    def _seconds_left(self) -> float:
        """Until the round is over, no matter who has not answered by then."""
        ends = [self._began + self._config.deadline_seconds, *(self._end_of(name) for name in self._waiting)]
        if not self._result.has_quorum:
            ends.append(self._approvals.end(self._config.approval_seconds))
        return max(ends) - self._clock()

    def _over(self) -> bool:
        admitted = len(self._result.participants)
        needed = self._result.needed
        if self._complete:
            return True
        if self._waiting:
            return False
        if not self._idle or admitted + len(self._idle) - self._given_up < needed:
            return True
        if not self._result.has_quorum:
            return False
        absent = [name for name in self._idle if name not in self._approvals]
        since = max([self._began, *(self._lost[name].at for name in absent if name in self._lost)])
        return not absent or self._clock() - since >= self._config.absent_seconds

    def _close(self) -> None:
        """Anyone who is still missing is shown, with the reason."""
        for name in [name for name in self._times if name in self._waiting]:
            if self._complete:
                self._drop(name, _LATEST)
            else:
                self._time_out(name, self._config.deadline_seconds)
        for name in list(self._idle):
            if name in self._approvals:
                self._result.dropped[name] = NOT_APPROVED
            elif name in self._lost or not self._complete:
                self._result.absent.append(name)
                self._drop(name, self._why_absent(name))
            else:
                self._drop(name, _LATEST)

    def _why_absent(self, name: str) -> str:
        if name in self._post.left():
            return LEFT
        return self._lost[name].reason if name in self._lost else "it was not connected"


def _without(people: list[str], here: list[str]) -> list[str]:
    return [name for name in people if name not in here]
