"""Organizations at which nobody has approved the plan yet: no failure, and no strike. They are asked again, with back-off.

An organization that connects anew is asked at once: whoever joins with a new federation.toml has approved its plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message

from cotune.models.errors import Declined
from cotune.plan.signatures import words_of

NOT_APPROVED = "nobody there has approved the plan yet; it is asked again, and joins once somebody has"
_SAID = Declined("training.approval", "").public
_FIRST_SECONDS, _LONGEST_SECONDS = 5.0, 300.0  # before it is asked again; doubled each time


def awaits_approval(reply: Message | None) -> bool:
    """Whether an answer says that the plan has to be approved by a person first, and nothing else."""
    return reply is not None and reply.has_error() and words_of(reply.error.reason or "")[0] == _SAID


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
