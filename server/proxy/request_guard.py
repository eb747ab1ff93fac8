"""The state that all connections of the proxy share: limits, members, and counts of what has passed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import h11

from cotune.server.proxy.allowed_calls import Refusal, content_length, get_call, reason_to_refuse
from cotune.server.proxy.authentication import FindMember, authenticate
from cotune.server.proxy.connection_slots import Slot, Slots, get_address_group
from cotune.server.proxy.fleet_types import FleetFormat
from cotune.server.proxy.in_flight_limits import Traffic
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.member_quotas import Quotas, Usage
from cotune.server.proxy.pushed_messages import SentObjects, find_push_problem
from cotune.server.proxy.rate_limited_log import RateLimitedLog

log = logging.getLogger("cotune.front")

ReportRefusal = Callable[[str, str], None]  # (whose request was refused, why)
_TOO_LARGE_STATUS = (413, 431)  # HTTP status of requests that are refused by the size of their head or content


def ignore_refusal(who: str, reason: str) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class RequestGuard:
    """Checks every request before it is forwarded, and counts what has passed.

    Attributes:
        limits: What one client may use.
        known: Returns the member that a public key belongs to.
        refused: Called with a member and the reason if its announcement was refused, it sends too much at once, or its quota is
            used up.
        turned_away: Called likewise with the address of a client that has not authenticated as a member.
        slots: The open connections.
        traffic: The content in transfer.
        sent: The objects that the server has sent.
        usage: What members have used.
        log: For refusals.
    """

    limits: Limits
    known: FindMember
    refused: ReportRefusal
    turned_away: ReportRefusal
    slots: Slots
    traffic: Traffic
    sent: SentObjects
    usage: Usage
    log: RateLimitedLog

    @classmethod
    def of(
        cls,
        limits: Limits,
        quotas: Quotas,
        known: FindMember,
        fleet: FleetFormat,
        refused: ReportRefusal,
        turned_away: ReportRefusal = ignore_refusal,
    ) -> RequestGuard:
        """Create the guard of a proxy that has just started.

        Args:
            limits: What one client may use.
            quotas: What one member may use.
            known: Returns the member that a public key belongs to.
            fleet: Names, numbers and parsers of the Fleet API.
            refused: See the attributes.
            turned_away: See the attributes.
        """
        return cls(
            limits,
            known,
            refused,
            turned_away,
            Slots(limits),
            Traffic(limits),
            SentObjects(fleet),
            Usage(quotas),
            RateLimitedLog(log.warning),
        )

    def admit(self, request: h11.Request, slot: Slot, client: str = "") -> str | Refusal:
        """Decide by its head whether the content of a request may be read.

        Args:
            request: Its head.
            slot: Of its connection.
            client: The client's address, if connections come through the coordinator's own proxy.

        Returns:
            The member that signed it, or the refusal.
        """
        if refusal := reason_to_refuse(request, self.limits):
            if refusal.status in _TOO_LARGE_STATUS:
                self._report_too_large(request, slot.address or get_address_group(client), refusal.reason)
            return refusal
        member = authenticate(request.headers, get_call(request), self.known, self.sent.fleet)
        if isinstance(member, Refusal):
            return member
        if full := self.slots.recognize(slot, member):
            return Refusal(503, full)
        return self._check_quota(member, get_call(request), content_length(request)) or member

    def _report_too_large(self, request: h11.Request, address: str, reason: str) -> None:
        member = authenticate(request.headers, get_call(request), self.known, self.sent.fleet)
        if isinstance(member, Refusal):
            self.turned_away(address, reason)
        else:
            self.refused(member, reason)

    def _check_quota(self, member: str, call: str, size: int) -> Refusal | None:
        announces = self.usage.take_message(member) if call == "push-messages" else None
        refusal = announces or self.usage.take(member, call, size)
        if refusal is not None:
            self.refused(member, refusal.reason)
        return refusal

    def record_requests(self, member: str, content: bytes) -> None:
        """Record the content of an answer to `pull-messages` before the member receives it."""
        self.usage.record_requests(member, self.sent.record_pull_response(content))

    def inspect_push(self, content: bytes, member: str) -> Refusal | None:
        """Check the content of a `push-messages`; return the refusal if it may not pass, else None."""
        reason = find_push_problem(content, self.limits.tree, self.sent)
        if reason is None:
            return None
        self.refused(member, reason)
        self.log.write(f"push {member}", f"refused what {member} announced: {reason}")
        return Refusal(400, f"this announcement is refused: {reason}")
