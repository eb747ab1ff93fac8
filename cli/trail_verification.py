"""Verify requests and replies on both sides, for `cotune server verify-trail` and `cotune client sent --verify`."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape

from cotune.cli.console import open_console
from cotune.client.audit_log import AuditLog
from cotune.client.node.keys import read_public_keys
from cotune.client.node.trust import Trust
from cotune.client.site import Site
from cotune.errors import RunError
from cotune.protocol.trail_comparison import TrailComparison, TrailEnd, compare_ends, read_coordinator_end, read_organization_end
from cotune.server.deployment.signed_trail import read_trail, read_verification_keys
from cotune.server.runs.run_folder import RunFolder


def verify_run(run: Path, site_log: Path) -> None:
    """Compare the trail of a run with an organization's log, and print what they do not have in common.

    Args:
        run: The folder of a run.
        site_log: An organization's audit.jsonl, or a copy of it.

    Raises:
        RunError: Where the log is not that of one organization of the run.
        typer.Exit: With 1, where the two contradict each other.
    """
    folder = RunFolder(run.expanduser().resolve())
    entries = AuditLog.at(site_log.expanduser()).entries()
    server, nodes = read_verification_keys(folder)
    unsure = read_organization_end(entries, server, [key for keys in nodes.values() for key in keys]).for_run(folder.file.id)
    names = sorted(unsure.recipients())
    if len(names) != 1:
        raise RunError(
            f"{site_log} holds requests of this run to {', '.join(names) or 'nobody'}: expected the log of one organization that"
            " took part in it",
            code="run.foreign_log",
        )
    node = nodes.get(names[0], ())
    coordinator = read_coordinator_end(read_trail(folder.path), names[0], server, node)
    _show(names[0], compare_ends(coordinator, read_organization_end(entries, server, node).for_run(folder.file.id)))


def verify_sent(site: Site, trail: Path | None) -> None:
    """Check the signatures in an organization's log and, with a copy of a run's trail.jsonl, that both agree."""
    server = [each.signing_key for each in Trust.read(site.folder).generations]
    node = read_public_keys(site.folder)
    own = read_organization_end(AuditLog(site.folder).entries(), server, node)
    if trail is None:
        _show(site.organization, compare_ends(own, own))
        return
    other = read_coordinator_end(read_trail(trail.expanduser()), site.organization, server, node)
    _show(site.organization, compare_ends(other, _of_the_same_runs(own, other)))


def _of_the_same_runs(own: TrailEnd, other: TrailEnd) -> TrailEnd:
    runs = {request.run for request in other.requests.values()}
    parts = [own.for_run(run) for run in sorted(runs)]
    requests = {digest: request for part in parts for digest, request in part.requests.items()}
    replies = {digest: reply for part in parts for digest, reply in part.replies.items()}
    return TrailEnd(requests, replies, own.wrong)


def _show(name: str, found: TrailComparison) -> None:
    """Exits with 1 where the two ends contradict each other."""
    console = open_console()
    for line in found.one_sided:
        console.print(f"at one end only: {escape(line)}")
    for line in found.contradictions:
        console.print(f"[bold red]contradiction[/bold red]: {escape(line)}")
    signed = f"{found.requests} requests and {found.replies} answers of {escape(name)} are signed"
    console.print(f"{signed}; {len(found.contradictions)} contradictions, {len(found.one_sided)} at one end only")
    if found.contradictions:
        raise typer.Exit(1)
