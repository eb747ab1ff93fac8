"""Implement `cotune client sent`: show an organization's requests and what it has sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from cotune.cli.console import open_console, print_json
from cotune.cli.trail_verification import verify_sent
from cotune.client.audit_log import AuditLog
from cotune.client.site import Site
from cotune.errors import CotuneError
from cotune.privacy.accounting.display_rounding import round_up
from cotune.protocol.statements import FINISHED, RequestStatement
from cotune.reporting.formatting import SPACE, size


def show_sent(site: Path, trail: Path | None, *, verify: bool, as_json: bool) -> None:
    """Print a site's log, after checking that nothing in it was changed.

    Args:
        site: The site's folder.
        trail: A copy of a run's trail.jsonl to compare it with; None: none.
        verify: Whether to check the signatures instead of listing.
        as_json: Whether a program reads the output.
    """
    if verify or trail is not None:
        verify_sent(Site(site.expanduser()), trail)
        return
    log = AuditLog(Site(site.expanduser()).folder)
    entries = log.entries()
    head = log.head
    if as_json:
        print_json({"entries": entries, "head": head})
        return
    console = open_console()
    for entry in entries:
        console.print(escape(_line(entry).replace(SPACE, " ")))
    console.print(f"{len(entries)} lines, none changed; SHA-256 of the last: {head}")


def _line(entry: dict[str, Any]) -> str:
    when = str(entry.get("at", ""))[:16].replace("T", " ")
    round = entry.get("round", "")
    plan = f" {entry['plan']} ({entry['plan_id'][:12]}…)" if entry.get("plan_id") else ""
    if entry["what"] in ("update", "receipt"):
        epsilon = "" if entry.get("epsilon") is None else f", ε {round_up(entry['epsilon'])} stated"
        return f"{when} {entry['what']}{plan}, round {round}: {size(entry['bytes'])}{epsilon}, SHA-256 {entry['sha256'][:16]}…"
    if entry["what"] == "request":
        return f"{when} {_asked_for(entry)}{plan}, round {round}: signed by {str(entry.get('key'))[:16]}…"
    return f"{when} {entry['what']}{plan}, round {round}: {entry.get('reason') or entry.get('said', '')}"


def _asked_for(entry: dict[str, Any]) -> str:
    """A round to train, or the finished model, which comes as the last round's."""

    try:
        kind = RequestStatement.parse(str(entry.get("statement"))).kind
    except CotuneError:  # of an earlier version
        return "request"
    return "request with the finished model" if kind == FINISHED else "request to train"
