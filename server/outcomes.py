"""What became of a request to an organization: one type for replies, rounds, deliveries and exclusions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Accepted:
    """The reply is as agreed: the update enters the model, or the receipt confirms the finished one.

    Attributes:
        bytes: Size of the reply's payload.
        steps: Optimizer steps of the update.
        epsilon: ε spent so far, as the organization states it; None without privacy.
        disclosures: What else it told, by name.
    """

    bytes: int = 0
    steps: int = 0
    epsilon: float | None = None
    disclosures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Declined:
    """The organization replied without an update: its policy does not allow the plan, or its training failed."""

    reason: str


@dataclass(frozen=True)
class Rejected:
    """The organization sent something that is not as agreed: a strike.

    Attributes:
        reason: What is wrong.
        file: Name of the file in quarantine/ that keeps what was sent; "" where nothing is kept.
    """

    reason: str
    file: str = ""


@dataclass(frozen=True)
class Lost:
    """No reply is to be expected: the organization is not connected or not a member, or its replies were lost.

    Attributes:
        reason: Why.
        is_absent: Whether the organization was away at the end of the round; such rounds name it among the absent.
    """

    reason: str
    is_absent: bool = False


@dataclass(frozen=True)
class TimedOut:
    """The organization was connected and did not reply in time.

    Attributes:
        reason: How long it had.
        is_strike: Whether it counts as a strike: not in a simulation, nor where too few others replied, nor where the round was
            complete without it.
    """

    reason: str
    is_strike: bool = False


Outcome = Accepted | Declined | Rejected | Lost | TimedOut


def is_strike(outcome: Outcome) -> bool:
    """Return whether an outcome counts against an organization."""
    return isinstance(outcome, Rejected) or (isinstance(outcome, TimedOut) and outcome.is_strike)
