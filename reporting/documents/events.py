"""The lines of events.jsonl as models: a union that the name of the event tells apart."""

from __future__ import annotations

from collections.abc import KeysView
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from cotune.reporting.documents.base import Document, Number
from cotune.reporting.documents.rounds import MetricsEntry, RoundEntry, SuspectEntry

_Round = Annotated[int, Field(description="Number of the round.")]
_Organization = Annotated[str, Field(description="Name of the organization.")]
_Reason = Annotated[str, Field(description="Why.")]


class Event(Document):
    """One line of events.jsonl."""

    event: str = Field(description="Name of the event.")
    at: str = Field("", description="When it was written (UTC).")

    def as_json(self) -> dict[str, Any]:
        """Return the fields of the line, the time and the name first."""
        fields = self.model_dump(exclude_unset=True, by_alias=True, exclude={"event", "at"})
        return {"at": self.at, "event": self.event, **fields} if self.at else {"event": self.event, **fields}

    def keys(self) -> KeysView[str]:
        """Return the keys of the line."""
        return self.as_json().keys()

    @property
    def fields(self) -> dict[str, Any]:
        """The fields beside the time and the name."""
        return {key: value for key, value in self.as_json().items() if key not in ("at", "event")}


class RunStarted(Event):
    """A process begins to train, or goes on."""

    event: Literal["run_started"] = "run_started"
    folder: str = Field(description="Folder of the run.")
    plan: str = Field(description="Name of the plan.")
    plan_id: str = Field(description="SHA-256 of the plan's canonical form.")
    rounds: int = Field(description="Rounds of the plan.")
    resumed_after: int = Field(description="The last round that was finished before; 0 for a new run.")


class RoundStarted(Event):
    """Organizations are asked to train."""

    event: Literal["round_started"] = "round_started"
    round: _Round
    stage: str = Field(description="`head`, `lora` or `full`.")
    organizations: list[str] = Field(description="Who is asked.")


class UpdateReceived(Event):
    """An update is as agreed, and enters the round."""

    event: Literal["update_received"] = "update_received"
    round: _Round
    organization: _Organization
    bytes: int = Field(description="Size of the update.")
    steps: int = Field(0, description="Optimizer steps of the update.")
    epsilon: Number | None = Field(
        None, description="As it states it: ε spent so far, or the most that it may spend; null without privacy."
    )


class UpdateDropped(Event):
    """There is no update: the organization refused, was late, lost or away, or the round was complete."""

    event: Literal["update_dropped"] = "update_dropped"
    round: _Round
    organization: _Organization
    reason: _Reason


class UpdateQuarantined(Event):
    """An update is not as agreed."""

    event: Literal["update_quarantined"] = "update_quarantined"
    round: _Round
    organization: _Organization
    reason: _Reason
    file: str = Field(description="File in `quarantine/` that keeps it.")


class LateUpdateReceived(Event):
    """An update of an earlier round enters this one at its end."""

    event: Literal["late_update_received"] = "late_update_received"
    round: _Round
    organization: _Organization
    of_round: int = Field(description="The round that it was trained for.")
    bytes: int = Field(description="Size of the update.")


class LateUpdateIgnored(Event):
    """An update of an earlier round is not used."""

    event: Literal["late_update_ignored"] = "late_update_ignored"
    round: _Round
    organization: _Organization
    of_round: int = Field(description="The round that it was trained for.")


class RoundNotApplied(Event):
    """The accuracy fell by more than `server.max_accuracy_drop`, or no organization would take the state: that before stays."""

    event: Literal["round_not_applied"] = "round_not_applied"
    round: _Round
    accuracy: Number | None = Field(description="On the coordinator's test set, of the state that is not applied.")
    suspects: list[SuspectEntry] = Field(description="The updates that stood out most.")
    reason: str = Field("", description="Why no organization would take the state; empty where the accuracy fell.")


class WeightIsSmall(Event):
    """The share of an organization is below a tenth of an equal one; reported once."""

    event: Literal["weight_is_small"] = "weight_is_small"
    round: _Round
    organization: _Organization
    weight: Number = Field(description="Its share of the round, of 1.")


class MessagesRefused(Event):
    """The TLS proxy has refused messages of an organization meanwhile."""

    event: Literal["messages_refused"] = "messages_refused"
    organization: _Organization
    count: int = Field(description="How many since the last such event.")
    total: int = Field(description="How many since the proxy counts.")
    reason: str = Field(description="Why, of the last.")


class Note(Event):
    """What the coordinator should know before the first round."""

    event: Literal["note"] = "note"
    text: str = Field(description="One sentence.")


class ClientExcluded(Event):
    """An organization is not selected any more."""

    event: Literal["client_excluded"] = "client_excluded"
    round: int = Field(description="The first round without it.")
    organization: _Organization
    reason: _Reason


class AwaitingApproval(Event):
    """Who awaits an approval has changed; these organizations are asked again, and it is no strike."""

    event: Literal["awaiting_approval"] = "awaiting_approval"
    round: _Round
    organizations: list[str] = Field(description="Organizations that have not approved the plan yet; empty: none.")


class WholeStateSent(Event):
    """An organization did not hold the version that its request builds on (a plan's `wire_down`), and is sent the whole state."""

    event: Literal["whole_state_sent"] = "whole_state_sent"
    round: _Round
    organization: _Organization


class OrganizationLeft(Event):
    """An organization has left of its own accord, as by Ctrl-C; it is asked again once it rejoins."""

    event: Literal["organization_left"] = "organization_left"
    organization: _Organization


class Waiting(Event):
    """Too few organizations are connected to begin; again whenever that changes."""

    event: Literal["waiting"] = "waiting"
    round: _Round
    connected: list[str] = Field(description="Who is connected.")
    needed: int = Field(description="How many have to be.")
    absent: list[str] = Field(description="Who is not.")


class ConnectionLost(Event):
    """The server has lost its SuperLink."""

    event: Literal["connection_lost"] = "connection_lost"
    reason: _Reason


class ConnectionRestored(Event):
    """The server has its SuperLink back."""

    event: Literal["connection_restored"] = "connection_restored"


class DeliveryStarted(Event):
    """The finished model is delivered, in a run that is continued for that alone, too."""

    event: Literal["delivery_started"] = "delivery_started"
    organizations: list[str] = Field(description="Who lacks the finished model.")


class Delivered(Event):
    """An organization has confirmed the finished model."""

    event: Literal["delivered"] = "delivered"
    organization: _Organization


class DeliveryFailed(Event):
    """An organization has not confirmed the finished model."""

    event: Literal["delivery_failed"] = "delivery_failed"
    organization: _Organization
    reason: _Reason


class RoundFinished(Event, RoundEntry):
    """A round is over, and its checkpoint is written: the entry of `rounds` of summary.json."""

    event: Literal["round_finished"] = "round_finished"


class RunFinished(Event):
    """All rounds are over."""

    event: Literal["run_finished"] = "run_finished"
    rounds: int = Field(description="Rounds of the plan.")


class RunStopped(Event):
    """The run has ended before its last round, as the client-level ε would have been exceeded."""

    event: Literal["run_stopped"] = "run_stopped"
    rounds: int = Field(description="Rounds that were finished.")
    reason: _Reason


class RunFailed(Event):
    """The run cannot go on."""

    event: Literal["run_failed"] = "run_failed"
    round: _Round
    reason: _Reason


class RunFinalized(Event):
    """Everything else of a real run is written."""

    event: Literal["run_finalized"] = "run_finalized"
    summary: str = Field(description="Path of summary.json.")


class BaselineStarted(Event):
    """A model that the federated one is compared with is trained."""

    event: Literal["baseline_started"] = "baseline_started"
    baseline: str = Field(description="`alone/<organization>`, `alone-without-privacy/<organization>` or `pooled`.")


class BaselineFinished(Event):
    """A model that the federated one is compared with is trained and evaluated."""

    event: Literal["baseline_finished"] = "baseline_finished"
    baseline: str = Field(description="As in `baseline_started`.")
    metrics: MetricsEntry = Field(description="On the common test set.")


class BaselineFailed(Event):
    """A model that the federated one is compared with could not be trained; the run itself goes on."""

    event: Literal["baseline_failed"] = "baseline_failed"
    baseline: str = Field(description="As in `baseline_started`.")
    reason: _Reason


class ModelAdapted(Event):
    """An organization has adapted the federated model to its own records."""

    event: Literal["adapted"] = "adapted"
    organization: _Organization
    method: str = Field(description="How, with its strength.")


class AdaptationFailed(Event):
    """The federated model could not be adapted to an organization's own records."""

    event: Literal["adaptation_failed"] = "adaptation_failed"
    organization: _Organization
    reason: _Reason


class OtherEvent(Event):
    """An event that this version does not know, or that lacks a field: of another version, or of a damaged file."""


RunEvent = Annotated[
    RunStarted
    | RoundStarted
    | UpdateReceived
    | UpdateDropped
    | UpdateQuarantined
    | LateUpdateReceived
    | LateUpdateIgnored
    | RoundNotApplied
    | WeightIsSmall
    | MessagesRefused
    | Note
    | ClientExcluded
    | AwaitingApproval
    | WholeStateSent
    | OrganizationLeft
    | Waiting
    | ConnectionLost
    | ConnectionRestored
    | RoundFinished
    | RunFinished
    | RunStopped
    | RunFailed
    | DeliveryStarted
    | Delivered
    | DeliveryFailed
    | RunFinalized
    | BaselineStarted
    | BaselineFinished
    | BaselineFailed
    | ModelAdapted
    | AdaptationFailed,
    Field(discriminator="event"),
]

_EVENT: TypeAdapter[Event] = TypeAdapter(RunEvent)


def parse_event(fields: dict[str, Any]) -> Event:
    """Return a line of events.jsonl as the model of its event; one that is not known, or lacks a field, as `OtherEvent`.

    >>> parse_event({"event": "organization_left", "organization": "north"}).organization
    'north'
    """
    try:
        return _EVENT.validate_python(fields)
    except ValidationError:
        return OtherEvent.model_validate(fields)


def known_events() -> tuple[type[Event], ...]:
    """Return the models of all events, in the order in which a run meets them."""
    return get_args(get_args(RunEvent)[0])
