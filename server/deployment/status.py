"""How a federation stands: its organizations, its newest run, its certificate. Works whether or not anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cotune.errors import RunError
from cotune.flower.control_client import ControlClient
from cotune.privacy.accounting.rounding import round_up_number
from cotune.reporting.documents.events import Event, OtherEvent
from cotune.reporting.documents.rounds import RoundEntry
from cotune.server.deployment.certificates import check_certificate
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.members import Member
from cotune.server.deployment.refusals import read_refusals, read_strangers
from cotune.server.runs.deliveries import read_deliveries
from cotune.server.runs.events import read_events
from cotune.server.runs.exclusions import count_strikes, find_excluded
from cotune.server.runs.history import get_last_weight, get_received_bytes, get_reported_epsilon
from cotune.server.runs.run_folder import RunFolder

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

_OVER = ("run_finalized", "run_failed")

History = Sequence[RoundEntry]  # of the finished rounds


@dataclass(frozen=True)
class OrganizationStatus:
    """connection: online, offline, or unknown while the server does not run. last_round: whose update entered the model; 0:
    none. weight: its share in the last round that it took part in. strikes: refused updates and time-outs in the run. word: what
    came of it last, in words. epsilon: as it stated it, rounded up; None: it stated none."""

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
    """round: the last that is finished. phase: by the last event that says one, unless nobody plays the run. accuracy: on the
    coordinator's test set."""

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


@dataclass(frozen=True)
class RefusedStatus:
    """Whose messages the front has refused since it was first started. who: a member, or the address of somebody who has not
    shown that it is one. reason: of the last."""

    who: str
    is_member: bool
    count: int
    reason: str
    at: str


@dataclass(frozen=True)
class Status:
    """certificate_expires: UTC; None where the certificate is not one that organizations accept, and `certificate_problem` says
    why."""

    federation: str
    server_reachable: bool
    certificate_expires: str | None
    certificate_problem: str | None
    run: RunStatus | None
    organizations: tuple[OrganizationStatus, ...]
    refused: tuple[RefusedStatus, ...] = ()


def connections(members: Sequence[Member], control: ControlClient) -> dict[str, str] | None:
    """Organization -> online or offline; None where the SuperLink cannot be asked."""
    try:
        online = {node.key for node in control.nodes() if node.online}
    except RunError:
        return None
    return {member.name: "online" if member.key in online else "offline" for member in members if member.revoked is None}


def look(federation: FederationFolder, connected: Mapping[str, str] | None, *, plays: bool = True) -> Status:
    """connected: see `connections`; None where the server does not run. plays: whether it has a run that is not over, as far as
    is known. Raises RunError for damaged files."""
    run, history, events = _newest(federation)
    members = federation.members.all()
    expires, problem = _certificate(federation)
    organizations = (_organization(member, connected, run, history, events) for member in members)
    return Status(
        federation=federation.config.name,
        server_reachable=connected is not None,
        certificate_expires=expires,
        certificate_problem=problem,
        run=None if run is None else _run(run, history, events, plays=plays),
        organizations=tuple(organizations),
        refused=tuple(_refused(federation)),
    )


def _refused(federation: FederationFolder) -> Iterator[RefusedStatus]:
    file = federation.superlink / "refused.json"
    for found, is_member in ((read_refusals(file), True), (read_strangers(file), False)):
        for who, refused in sorted(found.items(), key=lambda item: -item[1].count):
            yield RefusedStatus(who, is_member, refused.count, refused.reason, refused.at)


def _newest(federation: FederationFolder) -> tuple[RunFolder | None, History, list[Event]]:
    paths = list(federation.runs())
    if not paths:
        return None, (), []
    run = RunFolder(paths[-1], imports_parts=False)
    return run, run.history(), read_events(run.events.path) if run.events.path.exists() else []


def _certificate(federation: FederationFolder) -> tuple[str | None, str | None]:
    try:
        return check_certificate(federation.certificates, federation.config.hosts[0]).isoformat(timespec="seconds"), None
    except RunError as error:
        return None, str(error)


def _run(run: RunFolder, history: History, events: Sequence[Event], *, plays: bool) -> RunStatus:
    telling = [event for event in events if event.event in _PHASES or event.event == "round_started"]
    last = telling[-1] if telling else OtherEvent(event="")
    phase = "not begun" if not telling else _phase(last)
    tested = [entry.metrics.accuracy for entry in history if entry.metrics]
    return RunStatus(
        run=run.file.run,
        folder=str(run.path),
        plan=run.plan.name,
        plan_id=run.plan.plan_id,
        created=run.file.created,
        round=len(history),
        rounds=run.plan.rounds,
        phase=phase if plays or last.event in _OVER else "interrupted: `cotune server run --resume` goes on",
        reason=last.get("reason") if last.event == "run_failed" else run.stopped,
        last_event=events[-1].event if events else None,
        last_at=events[-1].at if events else None,
        accuracy=tested[-1] if tested else None,
    )


def _phase(last: Event) -> str:
    if last.event == "awaiting_approval" and not last["organizations"]:
        return "under way"
    return _PHASES.get(last.event, "under way")


def _organization(
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
        word=_word(member, run, history, events),
        epsilon=None if stated is None else round_up_number(stated),
        bytes_up=get_received_bytes(events, name),
        weight=get_last_weight(history, name),
        strikes=0 if run is None else count_strikes(run, history)[name],
    )


def _word(member: Member, run: RunFolder | None, history: History, events: Sequence[Event]) -> str:
    """The last that is known of an organization in the run."""
    name = member.name
    if member.revoked is not None:
        return "revoked"
    if run is None or name not in [who.name for who in run.file.participants]:
        return "not in a run yet" if run is None else "not in this run"
    if name in find_excluded(run, history):
        return "left out after refused updates or time-outs"
    has_model = name in read_deliveries(run)
    said = _last_said(name, events)
    if has_model and not any(name in entry.participants for entry in history):
        return f"{said}; has the finished model"
    return "has the finished model" if has_model else said


def _last_said(name: str, events: Sequence[Event]) -> str:
    for event in reversed(events):
        if event.get("organization") == name and (said := _said(event)):
            return said
        if event.event == "awaiting_approval" and name in event["organizations"]:
            return f"has yet to approve the plan, asked in round {event['round']}"
        if event.event == "round_started" and name in event["organizations"]:
            return f"asked in round {event['round']}"
    return "not asked yet"


def _said(event: Event) -> str:
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
        case "organization_left":
            return "has left the federation"
        case "delivery_failed":
            return f"lacks the finished model: {event['reason']}"
        case _:
            return ""
