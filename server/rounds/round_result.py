"""The result of a round, and its entry in the run's history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from cotune.data.metrics.metrics import Metrics
from cotune.errors import RunError
from cotune.plan.plan import Plan
from cotune.reporting.documents.rounds import DroppedEntry, LateEntry, MetricsEntry, RoundEntry
from cotune.server.request_outcomes import Accepted, Lost, Outcome, Rejected, TimedOut
from cotune.server.rounds.selection import explain_waiting

T = TypeVar("T")


@dataclass(frozen=True)
class RoundResult:
    """The result of one round.

    Attributes:
        number: The round.
        asked: Organizations, in the order in which updates are added.
        excluded: Organizations that may not take part any more.
        needed: Number of updates that form the quorum.
        outcomes: Organization -> outcome of its request; missing if the round ended before it was asked.
        late: Updates of earlier rounds that enter this one.
        late_rejected: Organizations whose update of an earlier round was rejected in this one.
        late_bytes: Size of the late updates.
        bytes_down: Size of the requests that were sent.
    """

    number: int
    asked: tuple[str, ...]
    excluded: tuple[str, ...]
    needed: int
    outcomes: Mapping[str, Outcome]
    late: tuple[LateEntry, ...] = ()
    late_rejected: tuple[str, ...] = ()
    late_bytes: int = 0
    bytes_down: int = 0

    def _of_kind(self, kind: type[T]) -> dict[str, T]:
        """Return organization -> outcome of one kind, in the order in which they were asked."""
        found = {name: self.outcomes.get(name) for name in self.asked}
        return {name: outcome for name, outcome in found.items() if isinstance(outcome, kind)}

    @property
    def participants(self) -> list[str]:
        """Organizations whose update enters the model, in the order in which they were asked."""
        return list(self._of_kind(Accepted))

    @property
    def dropped(self) -> dict[str, str]:
        """Organization -> why its update does not enter the model."""
        found = {name: self.outcomes[name] for name in self.asked if name in self.outcomes}
        return {name: outcome.reason for name, outcome in found.items() if not isinstance(outcome, Accepted)}

    @property
    def quarantined(self) -> list[str]:
        """Organizations with a rejected update, once for each."""
        return sorted([*self._of_kind(Rejected), *self.late_rejected])

    @property
    def timed_out(self) -> list[str]:
        """Organizations that get a strike because they did not reply in time."""
        return sorted(name for name, outcome in self._of_kind(TimedOut).items() if outcome.is_strike)

    @property
    def absent(self) -> list[str]:
        """Organizations that were not connected at the end of the round."""
        return [name for name, outcome in self._of_kind(Lost).items() if outcome.is_absent]

    @property
    def strikes(self) -> list[str]:
        """Organizations that get a strike, once for each."""
        return [*self.quarantined, *self.timed_out]

    @property
    def has_quorum(self) -> bool:
        """Whether enough updates were accepted."""
        return len(self.participants) >= self.needed

    def check_quorum(self, plan: Plan) -> None:
        """Check that enough updates were accepted.

        Raises:
            RunError: If not; it names who is missing, and why.
        """
        if self.has_quorum:
            return
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.dropped.items())
        raise RunError(
            f"round {self.number} got {len(self.participants)} of {len(self.asked)} updates, expected at least {self.needed}"
            f" ({_quorum(plan)}); {reasons[:1000]}{explain_waiting(self.dropped)}",
            code="run.no_quorum",
        )

    def entry(self, stage: str, metrics: Metrics | None, seconds: float) -> RoundEntry:
        """Return the round's entry for summary.json, independent of the order in which replies arrived.

        Args:
            stage: Name of the stage.
            metrics: Of the model after the round, on the common test set; None if there is none.
            seconds: Duration of the round.
        """
        accepted = self._of_kind(Accepted)
        late = sorted(self.late, key=lambda each: (each.round, each.organization))
        return RoundEntry(
            round=self.number,
            stage=stage,
            metrics=metrics_entry(metrics),
            epsilon={name: each.epsilon for name, each in accepted.items() if each.epsilon is not None},
            disclosures={name: dict(each.disclosures) for name, each in accepted.items() if each.disclosures},
            client_privacy=None,
            participants=self.participants,
            dropped=[DroppedEntry(organization=name, reason=reason) for name, reason in self.dropped.items()],
            quarantined=self.quarantined,
            timed_out=self.timed_out,
            absent=self.absent,
            excluded=list(self.excluded),
            late=late,
            bytes_up=sum(each.bytes for each in accepted.values()) + self.late_bytes,
            bytes_down=self.bytes_down,
            seconds=round(seconds, 3),
        )


def metrics_entry(metrics: Metrics | None) -> MetricsEntry | None:
    """Return metrics in the form that documents contain; None if there are none."""
    return None if metrics is None else MetricsEntry(**metrics.as_dict())


def _quorum(plan: Plan) -> str:
    given = plan.server.quorum
    return f"server.quorum = {given:g}" if given is not None else "server.quorum, by default half and at least two"
