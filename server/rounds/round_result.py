"""What comes in during a round, and how it stands in the run's history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cotune.data.tasks.task import Metrics
from cotune.errors import RunError
from cotune.plan.schema import Plan
from cotune.server.rounds.selection import advice
from cotune.strategies.types import Update


@dataclass
class RoundResult:
    """people: who is to be asked, in the order in which updates are added. needed: how many updates the quorum is."""

    people: list[str]
    needed: int
    left_out: list[str] = field(default_factory=list)
    participants: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # organization -> reason
    quarantined: list[str] = field(default_factory=list)
    timed_out: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    late: list[dict[str, Any]] = field(default_factory=list)
    epsilon: dict[str, float] = field(default_factory=dict)
    told: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    def admit(self, name: str, update: Update, size: int) -> None:
        self.participants.append(name)
        self.bytes_up += size
        if update.told:
            self.told[name] = dict(update.told)
        if update.epsilon is not None:
            self.epsilon[name] = update.epsilon

    @property
    def has_quorum(self) -> bool:
        return len(self.participants) >= self.needed

    def check_quorum(self, plan: Plan, round: int) -> None:
        """Raises RunError, with who is missing and why, when too few updates came."""
        if self.has_quorum:
            return
        reasons = "; ".join(f"{name}: {self.dropped[name]}" for name in self.people if name in self.dropped)
        raise RunError(
            f"round {round} got {len(self.participants)} of {len(self.people)} updates, expected at least {self.needed}"
            f" ({_quorum(plan)}); {reasons[:1000]}{advice(self.dropped)}"
        )

    def entry(self, number: int, stage: str, metrics: Metrics | None, seconds: float) -> dict[str, Any]:
        """A round as it stands in summary.json; whatever the order in which answers came."""
        came = set(self.participants)
        return {
            "round": number,
            "stage": stage,
            "metrics": metrics.as_dict() if metrics else None,
            "epsilon": self._in_order(self.epsilon),
            "told": self._in_order(self.told),
            "client_privacy": None,
            "participants": [name for name in self.people if name in came],
            "dropped": [{"organization": name, "reason": reason} for name, reason in self._in_order(self.dropped).items()],
            "quarantined": sorted(self.quarantined),
            "timed_out": sorted(self.timed_out),
            "absent": [name for name in self.people if name in self.absent],
            "left_out": self.left_out,
            "late": sorted(self.late, key=lambda late: (late["round"], late["organization"])),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": round(seconds, 3),
        }

    def _in_order(self, found: dict[str, Any]) -> dict[str, Any]:
        return {name: found[name] for name in self.people if name in found}


def _quorum(plan: Plan) -> str:
    given = plan.server.quorum
    return f"server.quorum = {given:g}" if given is not None else "server.quorum, by default half and at least two"
