"""The status of a federation: organizations, newest run, certificate. It can be read whether or not the server runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cotune.errors import RunError
from cotune.privacy.accounting.display_rounding import round_up_number
from cotune.reporting.documents.events import Event, OtherEvent
from cotune.reporting.documents.rounds import RoundEntry
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.front_refusals import read_refusals, read_strangers
from cotune.server.deployment.keys.certificates import check_certificate
from cotune.server.deployment.members import Member
from cotune.server.runs.deliveries import read_deliveries
from cotune.server.runs.events import read_events
from cotune.server.runs.exclusions import count_strikes, find_excluded
from cotune.server.runs.organization_history import get_last_weight, get_received_bytes, get_reported_epsilon
from cotune.server.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from cotune.flower.control_client import ControlClient  # loads Flower, also where the server does not run

_PHASES = {
    "run_started": "under way",
    "waiting": "waiting for organizations",
    "awaiting_approval": "waiting for organizations to approve the plan",
    "run_finished": "handing out the model",
    "run_stopped": "handing out the model",
    "delivery_started": "handing out the model",
    "run_finalized": "finished",
    "run_failed": "failed",
}

_FINAL_EVENTS = ("run_finalized", "run_failed")

History = Sequence[RoundEntry]  # of the finished rounds


@dataclass(frozen=True)
class OrganizationStatus:
    """The status of an organization.

    Attributes:
        name: Of the organization.
        invited: When (UTC).
        revoked: When (UTC); None: it may take part.
        connection: "online", "offline", or "unknown" while the server does not run.
        last_round: The last round whose model contains an update of it; 0: none.
        word: The last event about it, in words.
        epsilon: ε as it reported it, rounded up; None: it reported none.
        bytes_up: Bytes that it has sent in the run.
        weight: Its share in the last round that it took part in.
        strikes: Rejected updates and time-outs in the run.
    """

    name: str
    invited: str
    revoked: str | None
    connection: str
    last_round: int
    word: str
    epsilon: float | None
    bytes_up: int
    weight: float | None = None
    strikes: int = 0


@dataclass(frozen=True)
class RunStatus:
    """The status of the newest run.

    Attributes:
        round: The last finished round.
        phase: What it is doing, according to the last event about that.
        reason: Why it failed or was stopped.
        accuracy: On the coordinator's test set.
        bytes_up: Size of the updates of the last finished round; None before the first.
        bytes_down: Size of its requests.
        wire: The codec of updates.
        wire_down: The codec of changes of the model; float32: it travels whole.
        collaboration: What is shared: parameters, or predictions for public inputs.
        holds_base: Whether the server held the base model's weights when the run was made.
    """

    run: str
    folder: str
    plan: str
    plan_id: str
    created: str
    round: int
    rounds: int
    phase: str
    reason: str | None
    last_event: str | None
    last_at: str | None
    accuracy: float | None
    bytes_up: int | None
    bytes_down: int | None
    wire: str
    wire_down: str = "float32"
    collaboration: str = "parameters"
    holds_base: bool = True


@dataclass(frozen=True)
class RefusedStatus:
    """A sender whose messages the front has refused since it was first started.

    Attributes:
        who: A member, or the address of a stranger.
        is_member: Whether it is a member.
        count: The number of refusals.
        reason: Of the last refusal.
        at: When that was (UTC).
    """

    who: str
    is_member: bool
    count: int
    reason: str
    at: str


@dataclass(frozen=True)
class Status:
    """The state of a federation.

    Attributes:
        federation: Its name.
        server_reachable: Whether the SuperLink answers.
        certificate_expires: When (UTC); None if organizations would not accept the certificate.
        certificate_problem: Why they would not.
        run: The newest run, if there is one.
        organizations: All members.
        refused: Senders whose messages the front has refused.
    """

    federation: str
    server_reachable: bool
    certificate_expires: str | None
    certificate_problem: str | None
    run: RunStatus | None
    organizations: tuple[OrganizationStatus, ...]
    refused: tuple[RefusedStatus, ...] = ()


def read_connections(members: Sequence[Member], control: ControlClient) -> dict[str, str] | None:
    """Return "online" or "offline" for each organization; None if the SuperLink does not answer."""
    try:
        online = {node.key for node in control.nodes() if node.online}
    except RunError:
        return None
    return {member.name: "online" if member.key in online else "offline" for member in members if member.revoked is None}


def look(federation: FederationFolder, connected: Mapping[str, str] | None, *, plays: bool = True) -> Status:
    """Read the state of a federation from its files.

    Args:
        federation: The federation.
        connected: The result of `read_connections`; None if the server does not run.
        plays: Whether the SuperLink has a run that is not over, as far as known.

    Raises:
        RunError: If a file is damaged.
    """
    run, history, events = _read_newest_run(federation)
    members = federation.members.all()
    expires, problem = _check_certificate(federation)
    organizations = (_build_organization_status(member, connected, run, history, events) for member in members)
    return Status(
        federation=federation.config.name,
        server_reachable=connected is not None,
        certificate_expires=expires,
        certificate_problem=problem,
        run=None if run is None else _build_run_status(run, history, events, plays=plays),
        organizations=tuple(organizations),
        refused=tuple(_list_refused(federation)),
    )


def _list_refused(federation: FederationFolder) -> Iterator[RefusedStatus]:
    file = federation.files.superlink.refusals
    for found, is_member in ((read_refusals(file), True), (read_strangers(file), False)):
        for who, refused in sorted(found.items(), key=lambda item: -item[1].count):
            yield RefusedStatus(who, is_member, refused.count, refused.reason, refused.at)


def _read_newest_run(federation: FederationFolder) -> tuple[RunFolder | None, History, list[Event]]:
    paths = list(federation.runs())
    if not paths:
        return None, (), []
    run = RunFolder(paths[-1], imports_parts=False)
    return run, run.history(), read_events(run.events.path) if run.events.path.exists() else []


def _check_certificate(federation: FederationFolder) -> tuple[str | None, str | None]:
    try:
        return check_certificate(federation.certificates, federation.config.hosts[0]).isoformat(timespec="seconds"), None
    except RunError as error:
        return None, str(error)


def _build_run_status(run: RunFolder, history: History, events: Sequence[Event], *, plays: bool) -> RunStatus:
    telling = [event for event in events if event.event in _PHASES or event.event == "round_started"]
    last = telling[-1] if telling else OtherEvent(event="")
    phase = "not begun" if not telling else _describe_phase(last)
    tested = [entry.metrics.get("accuracy") for entry in history if entry.metrics]
    return RunStatus(
        run=run.file.run,
        folder=str(run.path),
        plan=run.plan.name,
        plan_id=run.plan.plan_id,
        created=run.file.created,
        round=len(history),
        rounds=run.plan.rounds,
        phase=phase if plays or last.event in _FINAL_EVENTS else "interrupted: `cotune server run --resume` goes on",
        reason=last.get("reason") if last.event == "run_failed" else run.stopped,
        last_event=events[-1].event if events else None,
        last_at=events[-1].at if events else None,
        accuracy=tested[-1] if tested else None,
        bytes_up=history[-1].bytes_up if history else None,
        bytes_down=history[-1].bytes_down if history else None,
        wire=run.plan.wire,
        wire_down=run.plan.wire_down,
        collaboration=run.plan.collaboration,
        holds_base=run.file.weights,
    )


def _describe_phase(last: Event) -> str:
    if last.event == "awaiting_approval" and not last["organizations"]:
        return "under way"
    return _PHASES.get(last.event, "under way")


def _build_organization_status(
    member: Member,
    connected: Mapping[str, str] | None,
    run: RunFolder | None,
    history: History,
    events: Sequence[Event],
) -> OrganizationStatus:
    name = member.name
    stated = get_reported_epsilon(history).get(name)
    rounds = [entry.round for entry in history if name in entry.participants]
    return OrganizationStatus(
        name=name,
        invited=member.invited,
        revoked=member.revoked,
        connection="unknown" if connected is None else connected.get(name, "offline"),
        last_round=max(rounds, default=0),
        word=_describe_last_reply(member, run, history, events),
        epsilon=None if stated is None else round_up_number(stated),
        bytes_up=get_received_bytes(events, name),
        weight=get_last_weight(history, name),
        strikes=0 if run is None else count_strikes(run, history)[name],
    )


def _describe_last_reply(member: Member, run: RunFolder | None, history: History, events: Sequence[Event]) -> str:
    """Return the last event about an organization in the run, in words."""
    name = member.name
    if member.revoked is not None:
        return "revoked"
    if run is None or name not in [who.name for who in run.file.participants]:
        return "not in a run yet" if run is None else "not in this run"
    if name in find_excluded(run, history):
        return "left out after refused updates or time-outs"
    has_model = name in read_deliveries(run)
    said = _describe_last_event(name, events)
    if has_model and not any(name in entry.participants for entry in history):
        return f"{said}; has the finished model"
    return "has the finished model" if has_model else said


def _describe_last_event(name: str, events: Sequence[Event]) -> str:
    for event in reversed(events):
        if event.get("organization") == name and (said := _describe_event(event)):
            return said
        if event.event == "awaiting_approval" and name in event["organizations"]:
            return f"has yet to approve the plan, asked in round {event['round']}"
        if event.event == "round_started" and name in event["organizations"]:
            return f"asked in round {event['round']}"
    return "not asked yet"


def _describe_event(event: Event) -> str:
    match event.event:
        case "update_received":
            return f"answered in round {event['round']}"
        case "update_quarantined":
            return f"refused in round {event['round']}: {event['reason']}"
        case "update_dropped":
            return f"dropped in round {event['round']}: {event['reason']}"
        case "late_update_received":
            return f"answered late, to round {event['of_round']}"
        case "late_update_ignored":
            return f"answered too late, to round {event['of_round']}"
        case "messages_refused":
            return f"{event['count']} messages refused at the front: {event['reason']}"
        case "whole_state_sent":
            return f"is sent the whole model in round {event['round']}"
        case "organization_left":
            return "has left the federation"
        case "delivery_failed":
            return f"lacks the finished model: {event['reason']}"
        case _:
            return ""
