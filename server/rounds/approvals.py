"""Track organizations at which nobody has approved the plan yet. They get no strike and are asked again, with back-off.

An organization that reconnects is asked again soon: joining with a new federation.toml approves its plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message

from cotune.protocol.refusals import APPROVAL, find_declining_rule, parse_refusal
from cotune.server.time_limits import TIME_LIMITS, TimeLimits

NOT_APPROVED = "nobody there has approved the plan yet; it is asked again, and joins once somebody has"


def awaits_approval(message: Message | None) -> bool:
    """Return whether a reply declines for one reason only: that a person has to approve the plan first."""
    if message is None or not message.has_error():
        return False
    return find_declining_rule(parse_refusal(message.error.reason or "")[0]) == APPROVAL


@dataclass(frozen=True)
class _Pending:
    at: float
    since: str
    times: int


class PendingApprovals:
    """The organizations that await approval in one round. Times are seconds on one monotonic clock."""

    def __init__(self, limits: TimeLimits = TIME_LIMITS) -> None:
        """Create an empty set.

        Args:
            limits: For the back-off.
        """
        self._limits = limits
        self._pending: dict[str, _Pending] = {}
        self._began: float | None = None

    def add(self, organization: str, at: float, since: str) -> bool:
        """Add an organization that awaits approval.

        Args:
            organization: Its name.
            at: When it replied.
            since: When it last connected, as the SuperLink reports it.

        Returns:
            Whether it is new in the set.
        """
        before = self._pending.get(organization)
        self._pending[organization] = _Pending(at, since, before.times + 1 if before else 1)
        if self._began is None:
            self._began = at
        return before is None

    def discard(self, organization: str) -> bool:
        """Remove an organization that has another outcome, and return whether it awaited approval."""
        return self._pending.pop(organization, None) is not None

    def __contains__(self, organization: object) -> bool:
        return organization in self._pending

    def names(self) -> list[str]:
        """Return the organizations that await approval, sorted."""
        return sorted(self._pending)

    def is_due(self, organization: str, now: float, since: str) -> bool:
        """Return whether it is time to ask an organization again.

        Args:
            organization: One that awaits approval.
            now: The current time.
            since: When it last connected; a new value shortens the back-off.
        """
        pending = self._pending[organization]
        wait = self._limits.approval_backoff if since != pending.since else self._backoff(pending.times)
        return now >= pending.at + wait

    def end(self, seconds: float) -> float:
        """Return when a round stops waiting for approvals: `seconds` after the first was added; 0 if none is pending."""
        return self._began + seconds if self._pending and self._began is not None else 0.0

    def _backoff(self, times: int) -> float:
        return min(self._limits.max_approval_backoff, self._limits.approval_backoff * 2.0 ** min(times - 1, 20))
