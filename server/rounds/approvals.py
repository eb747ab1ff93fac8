"""Organizations at which nobody has approved the plan yet: no failure and no strike; they are asked again, with back-off.

An organization that reconnects is asked soon: one that joins with a new federation.toml has approved its plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message

from cotune.errors import PolicyError
from cotune.protocol.signatures import parse_refusal
from cotune.server.wait_times import TIME_LIMITS, TimeLimits

NOT_APPROVED = "nobody there has approved the plan yet; it is asked again, and joins once somebody has"
_PUBLIC_MESSAGE = PolicyError("training.approval", "").public


def awaits_approval(message: Message | None) -> bool:
    """Return whether a reply says that a person has to approve the plan first, and nothing else."""
    return message is not None and message.has_error() and parse_refusal(message.error.reason or "")[0] == _PUBLIC_MESSAGE


@dataclass(frozen=True)
class _Pending:
    at: float
    since: str
    times: int


class PendingApprovals:
    """Those of one round. Times are seconds on one monotonic clock."""

    def __init__(self, limits: TimeLimits = TIME_LIMITS) -> None:
        """Note none yet. limits: of the back-off."""
        self._limits = limits
        self._pending: dict[str, _Pending] = {}
        self._began: float | None = None

    def add(self, organization: str, at: float, since: str) -> bool:
        """Note that an organization awaits approval.

        Args:
            organization: Who replied so.
            at: When it replied.
            since: When it had connected, as the SuperLink says.

        Returns:
            Whether it did not await approval before.
        """
        before = self._pending.get(organization)
        self._pending[organization] = _Pending(at, since, before.times + 1 if before else 1)
        if self._began is None:
            self._began = at
        return before is None

    def discard(self, organization: str) -> bool:
        """Note another outcome of an organization, and return whether it had awaited approval."""
        return self._pending.pop(organization, None) is not None

    def __contains__(self, organization: object) -> bool:
        return organization in self._pending

    def names(self) -> list[str]:
        """Return the organizations that await approval, sorted."""
        return sorted(self._pending)

    def is_due(self, organization: str, now: float, since: str) -> bool:
        """Return whether to ask an organization again, which connected last at `since`."""
        pending = self._pending[organization]
        wait = self._limits.approval_backoff if since != pending.since else self._backoff(pending.times)
        return now >= pending.at + wait

    def end(self, seconds: float) -> float:
        """Return until when a round waits for approvals: `seconds` after the first was noted; 0 where none is pending."""
        return self._began + seconds if self._pending and self._began is not None else 0.0

    def _backoff(self, times: int) -> float:
        return min(self._limits.max_approval_backoff, self._limits.approval_backoff * 2.0 ** min(times - 1, 20))
