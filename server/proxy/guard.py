"""What all connections of the front share: limits, members, and what has passed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import h11

from cotune.server.proxy.fleet_format import FleetFormat
from cotune.server.proxy.identity import Known, signer
from cotune.server.proxy.pushes import Sent, reason_to_refuse_push
from cotune.server.proxy.quotas import Quotas, Usage
from cotune.server.proxy.rules import Limits, Refusal, call_of, content_length, reason_to_refuse
from cotune.server.proxy.slots import Slot, Slots, group_of
from cotune.server.proxy.sparing import Sparing
from cotune.server.proxy.traffic import Traffic

log = logging.getLogger("cotune.front")

Noted = Callable[[str, str], None]  # whose request was refused, and why
_TOO_LARGE = (413, 431)  # HTTP status: refused by its head alone, no matter who has signed it


def unnoted(who: str, reason: str) -> None:
    """Nobody asks."""


@dataclass(frozen=True)
class Guard:
    """known: see `identity.Known`. refused: told of the member whose announcement was refused, who sends too much at once, or
    whose quota is used up, and why. turned_away: the same of the address of somebody who has not shown that it is a member.
    """

    limits: Limits
    known: Known
    refused: Noted
    turned_away: Noted
    slots: Slots
    traffic: Traffic
    sent: Sent
    usage: Usage
    log: Sparing

    @classmethod
    def of(
        cls, limits: Limits, quotas: Quotas, known: Known, fleet: FleetFormat, refused: Noted, turned_away: Noted = unnoted
    ) -> Guard:
        return cls(
            limits, known, refused, turned_away, Slots(limits), Traffic(limits), Sent(fleet), Usage(quotas), Sparing(log.warning)
        )

    def admit(self, request: h11.Request, slot: Slot, client: str = "") -> str | Refusal:
        """The member that has signed a request, which may be read; or why it may not. client: its address, where that of the slot
        is a proxy's.
        """
        if refusal := reason_to_refuse(request, self.limits):
            if refusal.status in _TOO_LARGE:
                self._note_too_large(request, slot.address or group_of(client), refusal.reason)
            return refusal
        member = signer(request.headers, call_of(request), self.known, self.sent.fleet)
        if isinstance(member, Refusal):
            return member
        if full := self.slots.recognize(slot, member):
            return Refusal(503, full)
        return self._beyond_quota(member, call_of(request), content_length(request)) or member

    def _note_too_large(self, request: h11.Request, address: str, reason: str) -> None:
        member = signer(request.headers, call_of(request), self.known, self.sent.fleet)
        if isinstance(member, Refusal):
            self.turned_away(address, reason)
        else:
            self.refused(member, reason)

    def _beyond_quota(self, member: str, call: str, size: int) -> Refusal | None:
        announces = self.usage.announce(member) if call == "push-messages" else None
        refusal = announces or self.usage.take(member, call, size)
        if refusal is not None:
            self.refused(member, refusal.reason)
        return refusal

    def hand_over(self, member: str, content: bytes) -> None:
        """content: of an answer to `pull-messages`, before the member learns of it."""
        self.usage.hand_over(member, self.sent.remember(content))

    def look_into(self, content: bytes, member: str) -> Refusal | None:
        """Of a `push-messages`."""
        reason = reason_to_refuse_push(content, self.limits.tree, self.sent)
        if reason is None:
            return None
        self.refused(member, reason)
        self.log.tell(f"push {member}", f"refused what {member} announced: {reason}")
        return Refusal(400, f"this announcement is refused: {reason}")
