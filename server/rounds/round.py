"""One round: for whom the server waits, for how long, and when the round ends.

A round starts when as many organizations are connected as its quorum needs. It ends when all organizations, or enough of them,
have replied; when the quorum is reached and the missing ones have been disconnected for `server.absent_seconds`; when the quorum
cannot be reached any more; and at the latest `server.deadline_seconds` after its start. In a real run, slow organizations time
out: once the quorum is reached and half of those asked have replied, the time limit is `server.timeout_factor` times the median
of their times, and at least `server.min_timeout_seconds`.

An organization at which nobody has approved the plan yet is asked again. If the quorum is reached without it, the round does not
wait for it; otherwise for at most `server.approval_seconds`. After that it is asked again only while the round waits for others,
so that two such organizations cannot prolong a round forever. The round never waits for revoked organizations.

An organization that does not hold the version of the state on which its request builds is asked again at once, with the whole
state, and only once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Protocol

from cotune.errors import RunError
from cotune.plan.server_config import RoundsConfig
from cotune.protocol.refusals import lacks_version
from cotune.reporting.documents.events import (
    AwaitingApproval,
    Event,
    LateUpdateIgnored,
    LateUpdateReceived,
    UpdateDropped,
    UpdateQuarantined,
    UpdateReceived,
    Waiting,
    WholeStateSent,
)
from cotune.reporting.documents.rounds import LateEntry
from cotune.server.request_outcomes import Accepted, Declined, Lost, Outcome, Rejected, TimedOut
from cotune.server.rounds.approvals import NOT_APPROVED, PendingApprovals, awaits_approval
from cotune.server.rounds.requests import Requests, RequestTracker, RetryLimits
from cotune.server.rounds.round_result import RoundResult
from cotune.server.time_limits import TIME_LIMITS, TimeLimits
from cotune.server.transport.base import Reply, Transport
from cotune.server.transport.node_registry import LEFT, REVOKED, Node

_CONNECTION_POLL = 0.02  # seconds
_COMPLETE = "the round was complete before it answered"

Report = Callable[[Event], None]


class Receiver(Protocol):
    """Reads replies, and adds accepted updates to the combination."""

    def receive(self, reply: Reply) -> Outcome:
        """Read a reply of this round, and add its update if it is valid."""
        ...

    def is_new_late(self, reply: Reply) -> bool:
        """Return whether no reply of its organization to that round was received before."""
        ...

    def folds(self, round: int) -> bool:
        """Return whether updates of an earlier round still enter this one."""
        ...

    def receive_late(self, reply: Reply) -> Outcome:
        """Read a reply of an earlier round, and store its update until the end of this one if it is valid."""
        ...

    def record_refusal(self, reply: Reply) -> None:
        """Record the refusal of an organization that will be asked again."""
        ...


@dataclass(frozen=True)
class Selection:
    """Who is asked in a round.

    Attributes:
        asked: Names, in the order in which their updates are added.
        needed: Number of updates that form the quorum.
        enough: Number of updates that complete the round.
        excluded: Names of those that may not take part any more.
        needs_several: Whether the quorum is at least two if at least two are asked, so that no round consists of one update.
    """

    asked: Sequence[str]
    needed: int
    enough: int
    excluded: Sequence[str] = ()
    needs_several: bool = False


class Round:
    """The state of one round, which no other class changes; `collect` runs it and returns the result."""

    def __init__(
        self,
        transport: Transport,
        config: RoundsConfig,
        selection: Selection,
        requests: Requests,
        receiver: Receiver,
        report: Report,
        *,
        is_real: bool = False,
        limits: TimeLimits = TIME_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a round without asking any organization yet.

        Args:
            transport: Carries requests and replies.
            config: The `[server]` table of the plan.
            selection: Who is asked, and how many updates are needed.
            requests: One for each of them.
            receiver: Reads their replies.
            report: Called with every event.
            is_real: Whether organizations work at the same time, so that their times are comparable.
            limits: Intervals of polling and of repeated requests.
            clock: Monotonic, in seconds.
        """
        self._transport = transport
        self._config = config
        self._selection = selection
        self._number = requests.round
        self._receiver = receiver
        self._report = report
        self._is_real = is_real
        self._limits = limits
        self._clock = clock
        self._needed = selection.needed
        self._eligible = len(selection.asked)  # number of organizations that were asked and not revoked
        self._outcomes: dict[str, Outcome] = {}
        self._late: list[LateEntry] = []
        self._late_rejected: list[str] = []
        self._late_bytes = 0
        self._approvals = PendingApprovals(limits)
        self._began = clock()
        retries = RetryLimits(backoff=limits.retry_backoff)
        self._tracker = RequestTracker(transport, requests, retries, self._lifetime_of, clock)

    def collect(self) -> RoundResult:
        """Ask organizations and receive replies until the round is over.

        Raises:
            RunError: If too few organizations are connected for too long.
        """
        self._await_quorum()
        self._began = self._clock()
        while not self._is_over():
            is_last = self._seconds_left() <= 0
            self._drop_revoked()
            self._tracker.ask(self._may_be_asked)
            self._tracker.ask_reconnected()
            self._time_out_slow()
            for reply in self._tracker.receive(self._limits.poll, last=is_last):
                self._handle(reply)
                if self._is_complete:
                    break
            if is_last:
                break
        self._close()
        return self._result()

    def _result(self) -> RoundResult:
        return RoundResult(
            number=self._number,
            asked=tuple(self._selection.asked),
            excluded=tuple(self._selection.excluded),
            needed=self._needed,
            outcomes=dict(self._outcomes),
            late=tuple(self._late),
            late_rejected=tuple(self._late_rejected),
            late_bytes=self._late_bytes,
            bytes_down=self._tracker.bytes_sent,
        )

    # --- replies

    def _handle(self, reply: Reply) -> None:
        name = reply.organization
        if reply.round != self._number:
            self._handle_late(reply)
        elif isinstance(reply.content, Lost):
            if self._tracker.note_lost(name, reply.content.reason):
                self._record(name, Lost(f"{reply.content.reason}, {self._tracker.losses(name)} times"))
        elif lacks_version(reply.message) and self._tracker.send_whole(name):
            self._receiver.record_refusal(reply)
            self._report(WholeStateSent(round=self._number, organization=name))
        elif self._is_real and awaits_approval(reply.message):
            self._receiver.record_refusal(reply)
            self._postpone(name)
        else:
            self._tracker.note_reply(name)
            self._record(name, self._receiver.receive(reply))

    def _handle_late(self, reply: Reply) -> None:
        """Store an update of an earlier round for the end of this one, or report it as ignored; a repeated reply is dropped."""
        name = reply.organization
        if isinstance(reply.content, Lost) or not self._receiver.is_new_late(reply):
            return
        if not self._receiver.folds(reply.round) or name in self._selection.excluded:
            self._report(LateUpdateIgnored(round=self._number, organization=name, of_round=reply.round))
            return
        outcome = self._receiver.receive_late(reply)
        if isinstance(outcome, Accepted):
            self._late.append(LateEntry(organization=name, round=reply.round))
            self._late_bytes += outcome.bytes
            size = outcome.bytes
            self._report(LateUpdateReceived(round=self._number, organization=name, of_round=reply.round, bytes=size))
            return
        if isinstance(outcome, Rejected):
            self._late_rejected.append(name)
        self._report_outcome(reply.round, name, outcome)

    def _record(self, name: str, outcome: Outcome) -> None:
        """Set an organization's outcome of this round; nothing else does."""
        self._tracker.settle(name)
        if self._approvals.discard(name):
            self._report_approvals()
        self._outcomes[name] = outcome
        self._report_outcome(self._number, name, outcome)

    def _report_outcome(self, round: int, name: str, outcome: Outcome) -> None:
        match outcome:
            case Accepted(bytes=size, steps=steps, epsilon=epsilon):
                self._report(UpdateReceived(round=round, organization=name, bytes=size, steps=steps, epsilon=epsilon))
            case Rejected(reason=reason, file=file):
                self._report(UpdateQuarantined(round=round, organization=name, reason=reason, file=file))
            case _:
                self._report(UpdateDropped(round=round, organization=name, reason=outcome.reason))

    @property
    def _accepted(self) -> list[str]:
        return [name for name, outcome in self._outcomes.items() if isinstance(outcome, Accepted)]

    @property
    def _has_quorum(self) -> bool:
        return len(self._accepted) >= self._needed

    @property
    def _is_complete(self) -> bool:
        return len(self._accepted) >= self._selection.enough

    # --- who is asked

    def _await_quorum(self) -> None:
        asked = list(self._selection.asked)
        reported = None
        while len(here := self._connected(asked)) < self._needed:
            if reported != here and self._transport.last_seen():
                reported = here
                missing = [name for name in asked if name not in here]
                self._report(Waiting(round=self._number, connected=here, needed=self._needed, absent=missing))
            self._drop_revoked()
            if len(self._tracker.open) < self._needed:
                return  # too few may take part any more
            waited = self._clock() - self._began
            if waited > self._config.wait_seconds and (self._transport.last_seen() or waited > self._limits.first_look):
                raise self._too_few_connected(here)
            time.sleep(min(self._limits.poll, _CONNECTION_POLL))

    def _connected(self, names: list[str]) -> list[str]:
        connected = self._transport.connected()
        return [name for name in names if name in connected]

    def _too_few_connected(self, here: list[str]) -> RunError:
        asked = self._selection.asked
        missing = ", ".join(name for name in asked if name not in here)
        return RunError(
            f"round {self._number} has {len(here)} of {len(asked)} organizations connected after"
            f" {self._config.wait_seconds:g} seconds, expected at least {self._needed} (server.quorum); not there:"
            f" {missing[:500]}",
            code="run.too_few_connected",
        )

    def _may_be_asked(self, name: str, node: Node) -> bool:
        if name not in self._approvals:
            return True
        is_due = bool(self._tracker.loss_of(name)) or self._approvals.is_due(name, self._clock(), node.since)
        return is_due and self._waits_for_approvals

    def _lifetime_of(self, name: str) -> float:
        """Return the seconds for which a request stays valid: until its answer would be too late even to be folded in."""
        seconds = max(1.0, self._end_of(name) - self._clock())
        if self._config.late == "fold":
            seconds += self._config.max_staleness * self._config.deadline_seconds
        return seconds

    def _postpone(self, name: str) -> None:
        """Ask an organization again later and restart its time: it may take days until a person approves the plan."""
        since = self._tracker.connected_at(name)
        self._tracker.postpone(name)
        if self._approvals.add(name, self._clock(), since):
            self._report_approvals()

    def _report_approvals(self) -> None:
        self._report(AwaitingApproval(round=self._number, organizations=self._approvals.names()))

    # --- who is given up

    def _time_out_slow(self) -> None:
        """Time out organizations that take much longer than the others.

        The deadline itself is applied only after all replies that have arrived were read, unless the round waits for approvals
        beyond it.
        """
        timeout = self._timeout()
        deadline = self._config.deadline_seconds
        for name in self._tracker.waiting:
            if timeout < deadline and self._clock() - self._tracker.asked_at(name) >= timeout:
                self._time_out(name, timeout)
            elif self._clock() >= self._end_of(name) and self._seconds_left() > 0:
                self._time_out(name, deadline)

    def _timeout(self) -> float:
        """Return the time limit of one request in seconds.

        It is a multiple of the (upper) median time of accepted updates, so that no single organization can make it shorter than
        an honest one took.
        """
        config = self._config
        if not (self._is_real and config.timeout_factor and self._half_accepted and self._has_quorum):
            return config.deadline_seconds
        taken = [self._tracker.seconds_taken[name] for name in self._accepted]
        return config.enough_seconds(median_high(taken), config.deadline_seconds)

    @property
    def _half_accepted(self) -> bool:
        """Return whether at least half were accepted; if not, the fault may be at the coordinator."""
        return 2 * len(self._accepted) >= len(self._selection.asked)

    def _time_out(self, name: str, seconds: float) -> None:
        is_strike = self._is_real and self._half_accepted
        self._record(name, TimedOut(f"no reply within {seconds:g} seconds", is_strike))

    def _drop_revoked(self) -> None:
        """Drop revoked organizations; the quorum is then a fraction of the others."""
        revoked = self._transport.revoked()
        for name in [name for name in self._tracker.open if name in revoked]:
            self._record(name, Lost(REVOKED))
            self._eligible -= 1
            self._needed = min(self._needed, self._needed_of(self._eligible))

    def _needed_of(self, eligible: int) -> int:
        selection = self._selection
        if not eligible:
            return 1
        return self._config.needed(min(selection.enough, eligible), fuses=selection.needs_several)

    # --- when it is over

    def _end_of(self, name: str) -> float:
        """Return when the round stops waiting for an organization: after an approval, it has the full time from then on."""
        start = self._tracker.asked_at(name) if name in self._approvals else self._began
        return start + self._config.deadline_seconds

    def _seconds_left(self) -> float:
        """Return the seconds until the round ends, with or without the missing replies."""
        ends = [self._began + self._config.deadline_seconds, *(self._end_of(name) for name in self._tracker.waiting)]
        if not self._has_quorum:
            ends.append(self._approvals.end(self._config.approval_seconds))
        return max(ends) - self._clock()

    @property
    def _approvals_expired(self) -> bool:
        return self._clock() >= self._approvals.end(self._config.approval_seconds)

    @property
    def _waits_for_approvals(self) -> bool:
        """Return whether the round continues for pending approvals, or for others that are training."""
        is_training = any(name not in self._approvals for name in self._tracker.waiting)
        return is_training or not (self._has_quorum or self._approvals_expired)

    def _is_over(self) -> bool:
        if self._is_complete:
            return True
        if self._tracker.waiting:
            return False
        idle = self._tracker.idle
        given_up = len(self._approvals.names()) if self._approvals_expired else 0
        if not idle or len(self._accepted) + len(idle) - given_up < self._needed:
            return True
        return self._has_quorum and self._absent_long_enough(idle)

    def _absent_long_enough(self, idle: list[str]) -> bool:
        absent = [name for name in idle if name not in self._approvals]
        since = max([self._began, *(self._tracker.lost_at(name) for name in absent)])
        return not absent or self._clock() - since >= self._config.absent_seconds

    def _close(self) -> None:
        """Give every organization that is still missing an outcome."""
        for name in self._tracker.waiting:
            if self._is_complete:
                self._record(name, TimedOut(_COMPLETE))
            else:
                self._time_out(name, self._config.deadline_seconds)
        for name in self._tracker.idle:
            if name in self._approvals:
                self._outcomes[name] = Declined(NOT_APPROVED)  # events have reported it already
            elif self._tracker.loss_of(name) or not self._is_complete:
                self._record(name, Lost(self._reason_of_absence(name), is_absent=True))
            else:
                self._record(name, TimedOut(_COMPLETE))

    def _reason_of_absence(self, name: str) -> str:
        if name in self._transport.left():
            return LEFT
        return self._tracker.loss_of(name) or "it was not connected"
