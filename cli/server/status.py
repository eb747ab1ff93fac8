"""`cotune server status`: the organizations, the newest run and the certificate of a federation."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import open_console
from cotune.cli.options import AsJson, FederationPath
from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.formatting import instant, size
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.status import Status, look, read_connections

_WATCH_SECONDS = 2.0
_MAX_REFUSED = 5  # members and addresses that are shown


def status(
    folder: FederationPath,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds until Ctrl-C.")] = False,
) -> None:
    """Show the organizations, the newest run and the certificate, whether or not anything runs."""
    if watch and as_json:
        raise typer.BadParameter("--watch is for people: --json prints once")

    federation = FederationFolder(folder)
    console = open_console()
    if not watch and not _listens(federation.superlink_address):  # there is nobody to be asked
        _show(console, look(federation, None), as_json=as_json)
        return

    from cotune.flower.control_client import open_control  # loads Flower

    with open_control(federation.superlink_address, federation.files.certificates.authority) as asked:

        def now() -> Status:
            connected = read_connections(federation.members.all(), asked)
            return look(federation, connected, plays=connected is None or bool(asked.running()))

        if watch:
            _watch(console, now)
        else:
            _show(console, now(), as_json=as_json)


def _listens(address: str) -> bool:
    """Whether anything listens at host:port, on loopback."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _show(console: Console, found: Status, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, ensure_ascii=False))
    else:
        console.print(_page(found))


def _watch(console: Console, now: Callable[[], Status]) -> None:
    with suppress(KeyboardInterrupt), Live(_page(now()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_SECONDS)
            live.update(_page(now()), refresh=True)


def _page(found: Status) -> Group:
    runs = "runs" if found.server_reachable else "does not run"
    lines = [f"federation {escape(found.federation)}: the server {runs}"]
    if found.certificate_expires is not None:
        lines.append(f"certificate until {instant(found.certificate_expires)}")
    else:
        lines.append(f"[bold red]certificate: {escape(str(found.certificate_problem))}[/bold red]")
    return Group(*lines, *_run_lines(found), *_refused_lines(found), _members(found))


def _refused_lines(found: Status) -> list[str]:
    """Whom the public port has refused what it sent, the most often first."""
    shown = found.refused[:_MAX_REFUSED]
    left = found.refused[_MAX_REFUSED:]
    lines = [
        f"refused at the public port: {each.who if each.is_member else f'address {each.who}'}, {each.count} times,"
        f" last {instant(each.at)}: {each.reason}"
        for each in shown
    ]
    return [escape(line) for line in [*lines, *([f"and {len(left)} others"] if left else [])]]


def _run_lines(found: Status) -> list[str]:
    at = found.run
    if at is None:
        return ["no run yet"]
    accuracy = "" if at.accuracy is None else f", test accuracy {at.accuracy:.3f}"
    lines = [f"run {at.run}, plan {at.plan} ({at.plan_id[:12]}…), begun {instant(at.created)}"]
    lines.append(f"round {at.round} of {at.rounds}, {at.phase}{accuracy}")
    if at.bytes_up is not None and at.bytes_down is not None:
        changes = "" if at.wire_down == "float32" else f", as {at.wire_down} to who has an earlier version"
        lines.append(f"the last round took {size(at.bytes_up)} up, as {at.wire}, and {size(at.bytes_down)} down{changes}")
    if at.collaboration == "predictions":
        lines.append("organizations train models of their own, and share predictions for public inputs alone")
    if not at.holds_base:
        lines.append("the server does not hold the weights of the base model, and evaluates nothing")
    if at.round:
        members = [o for o in found.organizations if o.revoked is None or o.last_round]
        lines.append(f"{sum(1 for o in members if o.last_round)} of {len(members)} organizations are in this model")
    if at.reason is not None:
        lines.append(at.reason)
    if at.last_event is not None and at.last_at is not None:
        lines.append(f"last event: {at.last_event}, {instant(at.last_at)}")
    return [escape(line) for line in lines]


def _members(found: Status) -> Table:
    """Narrow enough for 80 columns: who was invited when, and with which key, is `list`'s to say."""
    table = Table(header_style="bold", pad_edge=False, box=None)
    table.add_column("organization", overflow="fold")
    table.add_column("connection")
    for heading in ("last round", "weight", "ε stated", "sent", "strikes"):
        table.add_column(heading, justify="right")
    table.add_column("last word", overflow="fold")
    for o in found.organizations:
        figures = (
            str(o.last_round or "–"),
            "–" if o.weight is None else f"{100 * o.weight:.3g} %",
            "–" if o.epsilon is None else round_up(o.epsilon),
            size(o.bytes_up),
            str(o.strikes or "–"),
        )
        table.add_row(escape(o.name), o.connection, *figures, escape(o.word))
    return table
