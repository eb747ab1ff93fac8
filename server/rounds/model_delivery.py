"""Deliver the final model to every organization of a run; delivered.json records who has confirmed it.

An organization that was absent gets the model when the run is continued: all that have not confirmed are asked again. One that is
connected and does not answer cannot delay the end of the run: once half have confirmed, it has `server.timeout_factor` times
their median, and at least `server.min_timeout_seconds`, as in a round.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from statistics import median_high

from flwr.app import Message, MessageType, RecordDict

from cotune.errors import CotuneError, RunError
from cotune.protocol.messages import Recipient, decode_receipt, encode_requests, received_digest
from cotune.protocol.statements import FINISHED, RECEIPT
from cotune.reporting.documents.events import Delivered, DeliveryFailed, DeliveryStarted
from cotune.server.request_outcomes import Accepted, Declined, Lost, Outcome, Rejected, TimedOut
from cotune.server.rounds.requests import Requests, RequestTracker, RetryLimits
from cotune.server.rounds.run_environment import ExampleBounds, RunEnvironment
from cotune.server.rounds.updates.replies import refuse_unsigned
from cotune.server.rounds.updates.update_validation import one_line
from cotune.server.runs.deliveries import read_deliveries, record_delivery
from cotune.server.runs.exclusions import StrikeRecord, find_excluded, read_strike_records
from cotune.server.runs.run_folder import Progress, RunFolder
from cotune.server.runs.run_model import final_params
from cotune.server.transport.base import Reply, Transport

_MAX_RECEIPT_BYTES = 2**20
_MAX_REQUESTS = 3

Members = Mapping[str, ExampleBounds | None]


def deliver(environment: RunEnvironment) -> list[str]:
    """Deliver the final model to the members of a run that do not have it yet.

    It waits `server.absent_seconds` for those that are not connected. Excluded and revoked organizations get no model; excluded
    ones that are connected get a notice with the reason.

    Returns:
        The organizations that still lack the model.
    """
    progress = environment.folder.load()
    members = environment.read_members()
    lacking = _deliver_model(environment, progress, members)
    _notify_excluded(environment, progress, members)
    return lacking


def _deliver_model(environment: RunEnvironment, progress: Progress, members: Members) -> list[str]:
    folder = environment.folder
    without = {*find_excluded(folder, progress.history), *read_deliveries(folder)}
    lacking = [p.name for p in folder.file.participants if p.name in members and p.name not in without]
    folder.events.write(DeliveryStarted(organizations=lacking))
    if not progress.round or not lacking:
        return []
    state = final_params(folder.plan, progress)
    last = progress.last_admitted(lacking)
    recipients = [Recipient(name, last.get(name, 0)) for name in lacking]
    contents = dict(zip(lacking, encode_requests(folder.plan.canonical(), progress.round, state, recipients), strict=True))
    received = received_digest(state)
    _sign(environment, progress, contents, recipients, received)
    with closing(environment.open_transport()) as transport:
        return _Delivery(environment, transport, _requests(progress, contents), received).run()


def _notify_excluded(environment: RunEnvironment, progress: Progress, members: Members) -> None:
    """Send excluded organizations a request without a model, which they decline and enter in their audit logs."""
    folder = environment.folder
    out = find_excluded(folder, progress.history)
    fates = read_strike_records(folder, progress.history)
    fates = {p.name: fates[p.name] for p in folder.file.participants if p.name in out and p.name in members}
    if not progress.round or not fates:
        return
    recipients = [Recipient(name) for name in fates]
    contents = dict(zip(fates, encode_requests(folder.plan.canonical(), progress.round, {}, recipients), strict=True))
    received = received_digest({})
    _sign(environment, progress, contents, recipients, received, fates)
    with closing(environment.open_transport()) as transport:
        _Notices(environment, transport, _requests(progress, contents), received).run()


def _sign(
    environment: RunEnvironment,
    progress: Progress,
    contents: Mapping[str, RecordDict],
    recipients: list[Recipient],
    received: str,
    fates: Mapping[str, StrikeRecord] | None = None,
) -> None:
    cohort = progress.history[-1].participants
    environment.trail.sign(FINISHED, progress.round, contents, recipients, received, cohort, fates)


def _requests(progress: Progress, contents: Mapping[str, RecordDict]) -> Requests:
    return Requests(progress.round, MessageType.EVALUATE, contents, _MAX_RECEIPT_BYTES)


class _Delivery:
    """Sends the final model and waits for receipts."""

    def __init__(self, environment: RunEnvironment, transport: Transport, requests: Requests, received: str) -> None:
        self._folder: RunFolder = environment.folder
        self._trail = environment.trail
        self._transport = transport
        self._round = requests.round
        self._received = received
        config = self._folder.plan.server
        self._limits = environment.limits
        lifetime = config.absent_seconds + self._limits.export
        retries = RetryLimits(max_losses=_MAX_REQUESTS, max_requests=_MAX_REQUESTS, backoff=self._limits.retry_backoff)
        self._tracker = RequestTracker(transport, requests, retries, lambda name: lifetime)
        self._organizations = list(requests.contents)
        self._outcomes: dict[str, Outcome] = {}
        self._began = time.monotonic()
        self._has_looked = False  # whether it was known who is connected when organizations were last asked
        self._confirmed_before = len(read_deliveries(self._folder))

    @property
    def _max_wait(self) -> float:
        """Return the most seconds that a connected organization has."""
        return self._limits.export

    @property
    def _absent_seconds(self) -> float:
        """Return how many seconds to wait for organizations that are not connected."""
        return self._folder.plan.server.absent_seconds

    def run(self) -> list[str]:
        """Send until all organizations have an outcome or had enough time; return those that have not confirmed."""
        while not self._is_over():
            self._has_looked = self._transport.last_seen() > 0
            self._tracker.ask()
            self._tracker.ask_reconnected()
            for reply in self._tracker.receive(self._limits.poll):
                self._handle(reply)
        for name in self._tracker.open:
            self._record(name, self._missing(name))
        return [name for name in self._organizations if not isinstance(self._outcomes[name], Accepted)]

    def _missing(self, name: str) -> Lost | TimedOut:
        if name in self._transport.left():
            return Lost("it has left the federation")
        return TimedOut("it did not confirm in time") if name in self._tracker.waiting else Lost("it was not connected")

    def _timeout(self) -> float:
        """Return how long a connected organization may take: once half have confirmed, a multiple of what they took."""
        config = self._folder.plan.server
        taken = [self._tracker.seconds_taken[name] for name, each in self._outcomes.items() if isinstance(each, Accepted)]
        count = self._confirmed_before + len(taken)
        if not config.timeout_factor or not count or 2 * count < self._confirmed_before + len(self._organizations):
            return self._max_wait
        return config.enough_seconds(median_high(taken) if taken else 0.0, self._max_wait)

    def _is_over(self) -> bool:
        now = time.monotonic()
        seconds = now - self._began
        waiting = self._tracker.waiting
        if waiting:
            if seconds > self._absent_seconds + self._max_wait:
                return True
            timeout = self._timeout()
            are_silent = all(now - self._tracker.asked_at(name) > timeout for name in waiting)
            return are_silent and (not self._tracker.idle or seconds > self._absent_seconds)
        first_look = 0.0 if self._has_looked else self._limits.first_look
        return not self._tracker.idle or seconds > max(self._absent_seconds, first_look)

    def _handle(self, reply: Reply) -> None:
        name = reply.organization
        if name not in self._tracker:
            return
        message = reply.take()
        if isinstance(message, Lost):
            if self._tracker.note_lost(name, message.reason):
                self._record(name, message)
            return
        self._tracker.note_reply(name)
        self._record(name, self._read(message, name) if isinstance(message, Message) else message)

    def _record(self, name: str, outcome: Outcome) -> None:
        """Set an organization's outcome; nothing else does."""
        self._tracker.settle(name)
        self._outcomes[name] = outcome
        if isinstance(outcome, Accepted):
            record_delivery(self._folder, name)
            self._folder.events.write(Delivered(organization=name))
        else:
            self._folder.events.write(DeliveryFailed(organization=name, reason=outcome.reason))

    def _read(self, message: Message, name: str) -> Outcome:
        """Verify a reply. It may be malformed in any way, which must not keep the others from getting the model."""
        try:
            return self._verify(message, name)
        except (CotuneError, OSError, MemoryError):
            raise
        except Exception as error:
            return Rejected(f"its answer cannot be read ({type(error).__name__})")

    def _verify(self, message: Message, name: str) -> Outcome:
        """Return whether a reply is a receipt for this model."""
        if refused := refuse_unsigned(self._trail, message, RECEIPT, self._round, name):
            return refused
        try:
            receipt = decode_receipt(message.content)
        except RunError as error:
            return Rejected(one_line(str(error)))
        found = (receipt.organization, receipt.plan_id, receipt.received)
        if found != (name, self._folder.plan.plan_id, self._received):
            return Rejected("its receipt is for another model or organization")
        return Accepted()


class _Notices(_Delivery):
    """Notifies excluded organizations; it does not wait long, so that none of them delays the end of the run."""

    @property
    def _max_wait(self) -> float:
        return self._limits.notice

    @property
    def _absent_seconds(self) -> float:
        return 0.0

    def _verify(self, message: Message, name: str) -> Outcome:
        if message.has_error():
            self._trail.accept_refusal(message, RECEIPT, self._round, name)
        return Declined("it was excluded from the run and informed of it")
