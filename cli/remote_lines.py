"""What is said of the events that only a real federation has: who is awaited, refused, lost and found again."""

from __future__ import annotations

from typing import Any

from cotune.privacy.rounding import round_up
from cotune.server.figures import size


def remote_line(event: str, fields: dict[str, Any]) -> str | None:
    """None for any other event."""
    who, round = fields.get("organisation"), fields.get("round")
    match event:
        case "waiting":
            return _waiting(fields)
        case "awaiting_approval":
            return _awaiting_approval(fields)
        case "round_started" if round == 1:
            return f"round 1: asking {', '.join(fields['organisations'])}; each encodes its records first, for minutes"
        case "update_received":
            return _received(fields)
        case "update_quarantined":
            return f"round {round}: the update of {who} was refused and put aside: {fields['reason']}"
        case "messages_refused":
            return f"{who} has had {fields['count']} messages refused at the public port: {fields['reason']}"
        case "round_not_applied":
            return _not_applied(fields)
        case "weight_is_small":
            return f"{who} counts {100 * fields['weight']:.2g} % only: agree on its number of records (`invite --examples`)"
        case "note":
            return f"note: {fields['text']}"
        case "organisation_left_out":
            return f"{who} is left out of the run from now on: {fields['reason']}"
        case "connection_lost":
            return f"the connection to the SuperLink is lost: {fields.get('reason', 'it does not answer')}"
        case "connection_back":
            return "the connection to the SuperLink is back"
        case "organisation_left":
            return f"{who} has left the federation: it is asked again once it rejoins"
        case "delivered":
            return f"{who} has the finished model"
        case "undelivered":
            return f"{who} lacks the finished model: {fields['reason']}; --resume hands it out again"
        case "late_update_received":
            return f"round {round}: {who} answered late, to round {fields['of_round']}: its update counts less"
        case "late_update_ignored":
            return f"round {round}: {who} answered too late, to round {fields['of_round']}: not used"
        case "superlink_lost":
            return "the SuperLink does not answer; the run waits for it: see whether `cotune server start` still runs"
        case "superlink_back":
            return "the SuperLink answers again"
        case "run_lost":
            return f"the run ended without a word ({fields['reason']}); it is handed over again in {fields['seconds']:g} seconds"
        case "run_stopping":
            return "stopping the run, which may take a quarter of a minute"
        case _:
            return None


def _waiting(fields: dict[str, Any]) -> str:
    connected = fields["connected"]
    there = connected if isinstance(connected, int) else len(connected)
    absent = f"; not connected: {', '.join(fields['absent'])}" if fields["absent"] else ""
    return f"waiting for organisations: {there} connected, {fields['needed']} needed{absent}"


def _awaiting_approval(fields: dict[str, Any]) -> str:
    round, names = fields["round"], ", ".join(fields["organisations"])
    if not names:
        return f"round {round}: nobody has to approve the plan any more"
    return (
        f"round {round}: nobody has approved the plan yet at {names} (there: `cotune client approve SITE`); they are asked again"
        " until somebody has, and the round goes on without them where the others are enough"
    )


def _not_applied(fields: dict[str, Any]) -> str:
    names = ", ".join(each["organisation"] for each in fields["suspects"])
    whom = f"; what stood out most: the update of {names}" if names else ""
    return (
        f"round {fields['round']} is not applied, as the accuracy on the test set fell to {fields['accuracy']:.3f}"
        f" (server.max_accuracy_drop): the model before it stays{whom}"
    )


def _received(fields: dict[str, Any]) -> str:
    spent = "" if fields["epsilon"] is None else f", ε {round_up(fields['epsilon'])} stated"
    return f"round {fields['round']}: {fields['organisation']} answered, {size(fields['bytes'])}{spent}"
