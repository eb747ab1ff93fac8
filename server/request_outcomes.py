"""The outcome of a request to an organization: one type for replies, rounds, deliveries and exclusions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Accepted:
    """The reply is valid: the update enters the model, or the receipt confirms the final model.

    Attributes:
        bytes: Size of the reply's payload.
        steps: Optimizer steps of the update.
        epsilon: ε spent so far, as the organization states it; None without privacy.
        disclosures: Name -> number that it disclosed.
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
    """The organization sent something invalid, which is a strike.

    Attributes:
        reason: What is wrong.
        file: Name of the file in quarantine/ with what was sent; "" if nothing was stored.
    """

    reason: str
    file: str = ""


@dataclass(frozen=True)
class Lost:
    """No reply will arrive: the organization is not connected or not a member, or its replies were lost.

    Attributes:
        reason: Why.
        is_absent: Whether the organization was not connected at the end of the round, whose entry then lists it as absent.
    """

    reason: str
    is_absent: bool = False


@dataclass(frozen=True)
class TimedOut:
    """The organization was connected and did not reply in time.

    Attributes:
        reason: How long it had.
        is_strike: Whether it is a strike: not in a simulation, nor if too few others replied, nor if the round was complete
            without it.
    """

    reason: str
    is_strike: bool = False


Outcome = Accepted | Declined | Rejected | Lost | TimedOut


def is_strike(outcome: Outcome) -> bool:
    """Return whether an outcome counts against an organization."""
    return isinstance(outcome, Rejected) or (isinstance(outcome, TimedOut) and outcome.is_strike)
