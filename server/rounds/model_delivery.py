"""The finished model, handed to every organization of a run; delivered.json says who has confirmed it.

An organization that was away gets it when the run is continued: anyone who has not confirmed is asked again. One that is
connected
and silent does not hold up the end of the run: once half have confirmed, it is waited for `server.patience` times their median,
and at least `server.least_seconds`, as in a round; it gets it when the run is continued, too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from statistics import median_high

from flwr.app import Message, MessageType, RecordDict

from cotune.errors import CotuneError, RunError
from cotune.protocol.messages import Recipient, decode_receipt, encode_requests, received_digest
from cotune.protocol.signatures import FINISHED, RECEIPT
from cotune.server.rounds.session import ExampleBounds, Session, Trail
from cotune.server.rounds.update_validation import one_line
from cotune.server.runs.deliveries import confirmed, record_delivery
from cotune.server.runs.exclusions import fates_of, left_out
from cotune.server.runs.run_folder import Progress, RunFolder
from cotune.server.runs.run_model import final_params
from cotune.server.transport.base import Reply, Transport
from cotune.server.transport.node_registry import Node

_POLL_SECONDS = 0.1
_EXPORT_SECONDS = 600.0  # how long an organization may take to write its model
_NOTICE_SECONDS = 10.0
_MOST_BYTES = 2**20  # of a receipt
_MOST_TIMES = 3
_AGAIN_SECONDS = 2.0
_LOOK_SECONDS = 10.0  # for the first look at who is connected, however short the wait


def deliver(session: Session) -> list[str]:
    """Hands the served model to the members who lack it, and returns who still does.

    Those who are not connected are waited for `server.absent_seconds` long. Anyone who was left out or revoked gets none; who was
    left out, and is connected, is told so, and why.
    """
    progress = session.folder.load()
    members = session.read_members()
    lacking = _hand_out(session, progress, members)
    _tell_left_out(session, progress, members)
    return lacking


def _hand_out(session: Session, progress: Progress, members: Mapping[str, ExampleBounds | None]) -> list[str]:
    folder = session.folder
    without = {*left_out(folder, progress.history), *confirmed(folder)}
    lacking = [p.name for p in folder.file.participants if p.name in members and p.name not in without]
    folder.events.tell("delivery_started", organizations=lacking)
    if not progress.round or not lacking:
        return []
    state = final_params(folder.plan, progress)
    last = progress.admitted
    recipients = [Recipient(name, last.get(name, 0)) for name in lacking]
    contents = dict(zip(lacking, encode_requests(folder.plan.canonical(), progress.round, state, recipients), strict=True))
    received = received_digest(state)
    session.trail.sign(FINISHED, progress.round, contents, recipients, received, progress.history[-1]["participants"])
    with closing(session.open_transport()) as post:
        return _Delivery(post, folder, progress.round, contents, received, session.trail).play()


def _tell_left_out(session: Session, progress: Progress, members: Mapping[str, ExampleBounds | None]) -> None:
    """A request of this kind without a model: an organization answers it with a refusal, and enters it in its log."""
    folder = session.folder
    out = left_out(folder, progress.history)
    fates = fates_of(folder, progress.history)
    fates = {p.name: fates[p.name] for p in folder.file.participants if p.name in out and p.name in members}
    if not progress.round or not fates:
        return
    recipients = [Recipient(name) for name in fates]
    contents = dict(zip(fates, encode_requests(folder.plan.canonical(), progress.round, {}, recipients), strict=True))
    session.trail.sign(
        FINISHED, progress.round, contents, recipients, received_digest({}), progress.history[-1]["participants"], fates
    )
    with closing(session.open_transport()) as post:
        _Notices(post, folder, progress.round, contents, received_digest({}), session.trail).play()


class _Delivery:
    longest_wait = _EXPORT_SECONDS

    def __init__(
        self, post: Transport, folder: RunFolder, round: int, contents: Mapping[str, RecordDict], received: str, trail: Trail
    ) -> None:
        self._post = post
        self._folder = folder
        self._round = round
        self._received = received
        self._trail = trail
        self._idle = dict(contents)
        self._waiting = dict[str, RecordDict]()
        self._times = dict.fromkeys(contents, 0)
        self._not_before = dict.fromkeys(contents, 0.0)
        # requests; when who is waited for had connected
        self._under_way = Counter[str]()
        self._since = dict[str, str]()
        self._began = time.monotonic()
        self._looked = False
        self._before = len(confirmed(folder))  # who has it already
        # seconds, of those who have confirmed
        self._asked_at = dict[str, float]()
        self._took = list[float]()

    @property
    def patience(self) -> float:
        """Seconds that those are waited for who are not connected."""
        return self._folder.plan.server.absent_seconds

    def play(self) -> list[str]:
        lacking = list(self._times)
        while not self._over():
            self._send()
            for letter in self._post.receive(_POLL_SECONDS):
                if letter.organization in self._waiting and self._arrived(letter):
                    lacking.remove(letter.organization)
        for name in [name for name in lacking if name in self._idle or name in self._waiting]:
            self._undelivered(name, self._why_not(name))
        return lacking

    def _why_not(self, name: str) -> str:
        if name in self._post.left():
            return "it has left the federation"
        return "it did not confirm in time" if name in self._waiting else "it was not connected"

    @property
    def export_seconds(self) -> float:
        """How long one that is connected may take to confirm. With half of them confirmed, as the others took."""
        config = self._folder.plan.server
        most = self.longest_wait
        came = self._before + len(self._took)
        if not config.patience or not came or 2 * came < self._before + len(self._times):
            return most
        return config.enough_seconds(median_high(self._took) if self._took else 0.0, most)

    def _over(self) -> bool:
        seconds = time.monotonic() - self._began
        patience = self.patience
        if self._waiting:
            if seconds > patience + self.longest_wait:
                return True
            now = time.monotonic()
            longest = self.export_seconds
            silent = all(now - self._asked_at[name] > longest for name in self._waiting)
            return silent and (not self._idle or seconds > patience)
        return not self._idle or seconds > (patience if self._looked else max(patience, _LOOK_SECONDS))

    def _send(self) -> None:
        self._looked = self._post.looked() > 0
        connected = self._post.connected()
        for name in [name for name in self._idle if name in connected and time.monotonic() >= self._not_before[name]]:
            self._waiting[name] = self._idle.pop(name)
            self._hand_over(name, connected[name])
        for name in [name for name in self._waiting if name in connected and self._times[name] < _MOST_TIMES]:
            if connected[name].since != self._since[name]:  # its request may be lost: Flower hands each over once
                self._hand_over(name, connected[name])

    def _hand_over(self, name: str, node: Node) -> None:
        self._times[name] += 1
        self._under_way[name] += 1
        self._asked_at[name] = time.monotonic()
        self._since[name] = node.since
        ttl = self._folder.plan.server.absent_seconds + _EXPORT_SECONDS
        message = Message(self._waiting[name], node.id, MessageType.EVALUATE, ttl=ttl, group_id=str(self._round))
        self._post.send(self._round, name, message, _MOST_BYTES)

    def _arrived(self, letter: Reply) -> bool:
        """Whether the organization has confirmed; one that was lost is tried again."""
        name = letter.organization
        self._under_way[name] -= 1
        if not letter.answers and self._under_way[name]:
            return False  # it was asked twice, and may answer the other request
        content = self._waiting.pop(name)
        if letter.refused:
            self._undelivered(name, letter.refused)
            return False
        if letter.reply is None:
            if self._times[name] >= _MOST_TIMES:
                self._undelivered(name, letter.lost)
            else:
                self._idle[name] = content
                self._not_before[name] = time.monotonic() + _AGAIN_SECONDS * 2 ** (self._times[name] - 1)
            return False
        reason = self._looked_into(letter.reply, name)
        if reason:
            self._undelivered(name, reason)
            return False
        record_delivery(self._folder, name)
        self._took.append(time.monotonic() - self._asked_at[name])
        self._folder.events.tell("delivered", organization=name)
        return True

    def _looked_into(self, reply: Message, name: str) -> str:
        """What a stranger has sent may be wrong in any way, and must not keep the others from their model."""
        try:
            return self._wrong(reply, name)
        except (CotuneError, OSError, MemoryError):
            raise
        except Exception as error:
            return f"its answer cannot be read ({type(error).__name__})"

    def _wrong(self, reply: Message, name: str) -> str:
        """Why an answer is no receipt for this model; "" where it is one."""
        if reply.has_error():
            return one_line(self._trail.accept_refusal(reply, RECEIPT, self._round, name))
        if not reply.has_content():
            return "its answer is empty"
        if wrong := self._trail.accept(reply, RECEIPT, self._round, name):
            return one_line(wrong)
        try:
            receipt = decode_receipt(reply.content)
        except RunError as error:
            return one_line(str(error))
        found = (receipt.organization, receipt.plan_id, receipt.received)
        if found != (name, self._folder.plan.plan_id, self._received):
            return "its receipt is for another model or organization"
        return ""

    def _undelivered(self, name: str, reason: str) -> None:
        self._folder.events.tell("delivery_failed", organization=name, reason=reason)


class _Notices(_Delivery):
    """Nobody is waited for long: anyone who was left out must not hold up the end of a run."""

    longest_wait = _NOTICE_SECONDS

    @property
    def patience(self) -> float:
        return 0.0

    def _wrong(self, reply: Message, name: str) -> str:
        if reply.has_error():
            self._trail.accept_refusal(reply, RECEIPT, self._round, name)
        return "it was left out of the run, and was told so"
