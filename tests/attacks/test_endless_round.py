"""Members that keep a round from ever ending, and one that makes honest ones late: by what they say, and by when they say it.

On commit 15d5778 two of four that take turns in answering "nobody here has approved the plan", reconnecting in between, kept a round
going for as long as they liked after its quorum stood (30 days and more by the clock of this test), and before it for as long beyond
`server.approval_seconds`. One that was revoked while its approval was awaited counted as one that might still come. One of three that
answers at once halved the time that an honest one was given: a round of 500 s was a time-out, and a strike, for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from cotune.errors import PolicyError
from cotune.plan.server_config import RoundsConfig
from cotune.server.request_outcomes import Accepted, Declined, Outcome
from cotune.server.rounds.requests import Requests
from cotune.server.rounds.round import Round, Selection
from cotune.server.rounds.round_result import RoundResult
from cotune.server.transport.base import Reply
from cotune.server.transport.node_registry import REVOKED, Node

DAY = 24 * 3600.0
NOT_APPROVED = PolicyError("training.approval", "x").public
Answer = Callable[[int], tuple[float, str]]  # which request it is -> seconds until it is answered, and the refusal; "": an update


@pytest.fixture(autouse=True)
def _a_task_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a message is stamped with."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@dataclass
class Scripted:
    """A post by whose clock a day takes a moment. answers: organization -> how it answers, and whether it reconnects then."""

    answers: Mapping[str, Answer]
    restless: Collection[str] = ()
    now: float = 1000.0
    members: set[str] = field(default_factory=set)
    asked: dict[str, int] = field(default_factory=dict)
    _due: list[tuple[float, Reply]] = field(default_factory=list)
    _since: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.members = set(self.answers)

    def connected(self) -> Mapping[str, Node]:
        return {name: Node(i + 2, str(self._since.get(name, 0))) for i, name in enumerate(self.answers) if name in self.members}

    def revoked(self) -> Collection[str]:
        return set(self.answers) - self.members

    def last_seen(self) -> float:
        return self.now

    def left(self) -> Collection[str]:
        return ()

    def send(self, round: int, organization: str, message: Message, max_bytes: int) -> None:
        self.asked[organization] = self.asked.get(organization, 0) + 1
        seconds, words = self.answers[organization](self.asked[organization])
        message.metadata.__dict__["_message_id"] = "1"
        reply = Message(Error(1001, words), reply_to=message) if words else Message(RecordDict(), reply_to=message)
        self._due.append((self.now + seconds, Reply(round, organization, reply)))

    def receive(self, seconds: float, *, last: bool = False) -> Iterator[Reply]:
        """The next that is due, or half a minute later."""
        later = self.now + (0.0 if last else 30.0)
        self._due.sort(key=lambda due: due[0])
        if self._due and self._due[0][0] <= later:
            at, due = self._due.pop(0)
            self.now = max(self.now, at)
            if due.organization in self.restless:
                self._since[due.organization] = self._since.get(due.organization, 0) + 1
            yield due
        else:
            self.now = later

    def forget(self, round: int) -> None: ...

    def close(self) -> None: ...


class Stop(Exception):
    """The round has taken 30 days."""


@dataclass
class Counting:
    """Accepts every reply without an error, and calls `each` with every one."""

    post: Scripted
    each: Callable[[], None]
    began: float
    accepted: list[str] = field(default_factory=list)

    def receive(self, reply: Reply) -> Outcome:
        self._look()
        message = reply.take()
        if isinstance(message, Message) and not message.has_error():
            self.accepted.append(reply.organization)
            return Accepted()
        return Declined("declined")

    def record_refusal(self, reply: Reply) -> None:
        self._look()

    def _look(self) -> None:
        self.each()
        if self.post.now - self.began > 30 * DAY:
            raise Stop

    def is_new_late(self, reply: Reply) -> bool:
        raise AssertionError

    def folds(self, round: int) -> bool:
        raise AssertionError

    def receive_late(self, reply: Reply) -> Outcome:
        raise AssertionError


def played(
    post: Scripted, config: RoundsConfig, needed: int, each: Callable[[], None] = lambda: None
) -> tuple[RoundResult, float]:
    """What came of the round, and how long it took in seconds. Raises Stop after 30 days."""
    began = post.now
    names = list(post.answers)
    requests = Requests(1, MessageType.TRAIN, {name: RecordDict() for name in names}, 2**20)
    selection = Selection(names, needed, len(names))
    receiver = Counting(post, each, began)
    made = Round(post, config, selection, requests, receiver, lambda *a, **k: None, is_real=True, clock=lambda: post.now)
    result = made.collect()
    assert sorted(receiver.accepted) == sorted(result.participants)
    return result, post.now - began


def update(seconds: float) -> Answer:
    return lambda _: (seconds, "")


def never_approves(seconds: float, first: float | None = None) -> Answer:
    return lambda which: (seconds if first is None or which > 1 else first, NOT_APPROVED)


def test_alternating_failures_do_not_delay_a_round_with_quorum() -> None:
    answers = {"north": update(60.0), "south": update(60.0), "east": never_approves(290.0), "west": never_approves(290.0, 140.0)}
    round_result, seconds = played(Scripted(answers, restless=("east", "west")), RoundsConfig(), needed=2)
    assert round_result.participants == ["north", "south"]
    assert seconds < 3600.0, f"{seconds / DAY:.1f} days"
    assert set(round_result.dropped) == {"east", "west"}


def test_nor_one_without_a_quorum_beyond_the_time_for_approvals() -> None:
    config = RoundsConfig(approval_seconds=2 * DAY, timeout_factor=0)
    answers = {
        "north": update(60.0),
        "south": update(60.0),
        "east": never_approves(3000.0),
        "west": never_approves(3000.0, 1500.0),
    }
    round_result, seconds = played(Scripted(answers, restless=("east", "west")), config, needed=3)
    assert round_result.participants == ["north", "south"]
    assert 2 * DAY < seconds < 2 * DAY + 2 * 3600.0, f"{seconds / DAY:.1f} days"


def test_anyone_who_approves_while_others_train_still_takes_part() -> None:
    """The honest case that the bound must not touch: it approves at its third request, while one trains for half an hour."""
    answers = {"north": update(60.0), "slow": update(1800.0), "late": lambda which: (1.0, NOT_APPROVED if which < 3 else "")}
    round_result, _ = played(Scripted(answers), RoundsConfig(timeout_factor=0), needed=1)
    assert sorted(round_result.participants) == ["late", "north", "slow"]


def test_anyone_who_is_revoked_is_not_waited_for() -> None:
    post = Scripted({"north": update(60.0), "south": update(60.0), "east": never_approves(1.0)})
    round_result, seconds = played(post, RoundsConfig(), needed=3, each=lambda: post.members.discard("east"))
    assert round_result.participants == ["north", "south"]
    assert seconds < 600.0, f"{seconds / DAY:.1f} days"
    assert round_result.dropped == {"east": REVOKED}


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_one_that_answers_at_once_makes_no_honest_one_late(seconds: float) -> None:
    """Three times what an honest one took is enough for the other."""
    config = RoundsConfig(timeout_factor=3.0, min_timeout_seconds=60.0)
    post = Scripted({"mallory": update(seconds), "north": update(200.0), "south": update(500.0)})
    round_result, _ = played(post, config, needed=2)
    assert round_result.timed_out == []
    assert "south" in round_result.participants
