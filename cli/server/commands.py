"""`cotune server`: the coordinator of a federation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cotune.cli import trail
from cotune.cli.plan_options import Set
from cotune.cli.screen import beginning, screen
from cotune.data.readers.sources import check_new, check_source
from cotune.errors import PlanError, RunError
from cotune.plan.load import load_plan, read_document

if TYPE_CHECKING:  # torch takes seconds to import: only the commands that need it pay
    from cotune.server.deployment.federation import FederationFolder
    from cotune.server.deployment.members import Member

app = typer.Typer(no_args_is_help=True, help="Coordinate a federation: make it, serve it, invite organizations, run its plan.")
Federation = Annotated[Path, typer.Argument(metavar="FED", help="The federation's folder.")]
Host = Annotated[list[str] | None, typer.Option("--host", help="Name or address that organizations reach this machine by.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FED", help="The folder to make.")],
    plan: Annotated[str, typer.Option(help="A preset or a TOML file.")],
    host: Annotated[list[str], typer.Option(help="Name or address that organizations reach this machine by; repeatable.")],
    override: Set = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The public port.")] = 9092,
    superlink_port: Annotated[int, typer.Option(min=1, max=65535, help="Of the SuperLink, on loopback.")] = 9093,
    listen: Annotated[
        str, typer.Option(help='The address that the public port is opened at; "::" for IPv6 and IPv4.')
    ] = "0.0.0.0",
    name: Annotated[str | None, typer.Option(help="Of the federation; default: the plan's.")] = None,
    test: Annotated[Path | None, typer.Option(help="Records that every round's model is judged by.")] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="The SuperLink keeps messages in memory: faster, but its restart costs the round.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N: for judging the model.")] = "auto",
) -> None:
    """Make a federation: certificates, a plan with nothing left open, and what organizations are given."""
    if port == superlink_port:
        raise PlanError(f"--port and --superlink-port are both {port}: expected two different ports")
    read_document(plan, override or [])
    check_source(None if test is None else str(test))
    check_new(folder)
    beginning(f"making {folder}: loading PyTorch, then base model and test records")
    from cotune.server.deployment.creation import create_federation
    from cotune.server.deployment.federation import ServerConfig

    loaded = load_plan(plan, override or [])
    config = ServerConfig(
        name=name or loaded.name,
        hosts=tuple(dict.fromkeys(host)),
        listen=listen,
        port=port,
        superlink_port=superlink_port,
        database=not memory,
        test=None if test is None else test.expanduser().resolve(),
        device=device,
    )
    made = create_federation(folder, loaded, config)
    console = screen()
    console.print(f"{escape(str(made.path))} is the federation [bold]{escape(config.name)}[/bold]")
    console.print(f"labels: {escape(', '.join(made.plan.labels))}")
    console.print(f"give {escape(str(made.path / 'federation.toml'))} and JOIN.md to every organization;")
    console.print(f"its fingerprint, to be compared by telephone: {made.invitation.fingerprint}")
    console.print(f"next: cotune server start {escape(str(folder))}")


@app.command()
def start(folder: Federation) -> None:
    """Serve organizations until Ctrl-C: Flower's SuperLink on loopback, the TLS front before it, and an executor for runs."""
    from datetime import datetime

    beginning(f"starting {folder}; it takes some seconds until it is ready")
    from cotune.server.deployment.federation import FederationFolder
    from cotune.server.deployment.supervisor import supervise

    console = screen()
    supervise(
        FederationFolder(folder),
        lambda line: console.print(f"[dim]{datetime.now():%H:%M:%S}[/dim] {escape(line)}"),
    )


@app.command()
def invite(
    folder: Federation,
    name: Annotated[str, typer.Argument(help="Of the organization, such as hospital-a.")],
    key: Annotated[Path, typer.Argument(metavar="KEY.pub", help="Its public key, as `cotune client init` has made it.")],
    examples: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Updates that declare fewer or more records are refused.")
    ] = None,
) -> None:
    """Let an organization in by its public key."""
    from cotune.server.deployment.federation import FederationFolder
    from cotune.server.deployment.members import read_public_key

    opened = FederationFolder(folder)
    member = opened.members.invite(name, read_public_key(key.expanduser()), _range(examples))
    screen().print(f"{escape(member.name)} is invited; its key's fingerprint, to be compared by telephone: {member.fingerprint}")


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise PlanError(f'--examples "{text}" is not understood: expected two numbers from 1 on, such as 500:20000')
    return int(low), int(high)


@app.command()
def revoke(folder: Federation, name: Annotated[str, typer.Argument(help="Of the organization.")]) -> None:
    """Shut an organization out. Its key is never let in again."""
    from cotune.server.deployment.federation import FederationFolder

    member = FederationFolder(folder).members.revoke(name)
    screen().print(f"{escape(member.name)} is revoked; invite it with another key to let it in again")


@app.command("accept-key")
def accept_key(
    folder: Federation,
    renewal: Annotated[Path, typer.Argument(metavar="FILE", help="The node-renewal.json of `cotune client renew-key`.")],
) -> None:
    """Put an organization's new key in the place of its present one, which is never let in again. A run goes on meanwhile."""
    from cotune.protocol.key_renewal import read_node_renewal
    from cotune.server.deployment.federation import FederationFolder

    opened = FederationFolder(folder)
    member = opened.members.renew(read_node_renewal(renewal.expanduser()), opened.config.id)
    typer.echo(f"{member.name} has a new key; its fingerprint, to be compared by telephone: {member.fingerprint}")


@app.command("list")
def members(folder: Federation, as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON.")] = False) -> None:
    """Show who was invited, and with which key."""
    from cotune.server.deployment.federation import FederationFolder

    opened = FederationFolder(folder)
    found = opened.members.all()
    fingerprint = opened.invitation.fingerprint
    console = screen()
    if as_json:
        people = [{**member.model_dump(), "fingerprint": member.fingerprint} for member in found]
        typer.echo(json.dumps({"federation": opened.config.name, "fingerprint": fingerprint, "members": people}, indent=1))
        return
    console.print(f"{escape(opened.config.name)}; fingerprint of federation.toml: {fingerprint}")
    if found:
        console.print(_table(found))
    else:
        console.print("nobody is invited so far: cotune server invite FED NAME KEY.pub")


def _table(found: tuple[Member, ...]) -> Table:
    table = Table("organization", "invited", "key", "records", "", box=None, header_style="bold", pad_edge=False)
    for member in found:
        low_high = "–" if member.examples is None else f"{member.examples[0]:,} to {member.examples[1]:,}"
        revoked = "" if member.revoked is None else f"revoked {member.revoked[:10]}"
        table.add_row(escape(member.name), member.invited[:10], f"{member.fingerprint[:16]}…", low_high, revoked)
    return table


@app.command()
def renew(folder: Federation, host: Host = None) -> None:
    """Make a fresh certificate for the same key. Organizations need to do nothing, unless the first host is another."""
    from cotune.server.deployment import certificates
    from cotune.server.deployment import creation as founding
    from cotune.server.deployment import key_rotation as rotation
    from cotune.server.deployment.federation import FederationFolder

    opened = FederationFolder(folder)
    rotation.finish_activation(opened)
    changed = founding.renew_server(opened, tuple(dict.fromkeys(host or ())))
    until = certificates.check_certificate(opened.certificates)
    typer.echo(f"the certificate is valid until {until:%Y-%m-%d}; stop `cotune server start` and start it again to show it")
    if changed:
        fingerprint = opened.invitation.fingerprint
        typer.echo(
            f"the address is another now: give federation.toml to every organization again; its fingerprint: {fingerprint}"
        )


@app.command("renew-keys")
def renew_keys(
    folder: Federation,
    switch: Annotated[bool, typer.Option("--switch", help="Put the announced keys into use.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also where members do not know them yet.")] = False,
) -> None:
    """Renew the key that signs requests, and the certificate authority: announce new ones, and then, with --switch, use them."""
    from cotune.server.deployment import key_rotation as rotation
    from cotune.server.deployment.federation import FederationFolder

    opened = FederationFolder(folder)
    if not switch:
        _show_announced(opened, rotation.announce_keys(opened).about.new)
        return
    rotation.finish_activation(opened)
    without = rotation.list_members_without_keys(opened)
    if without and not anyway:
        raise RunError(
            f"{', '.join(without)[:500]} have not answered since the new keys were announced: wait for their next round, or give"
            f" them {opened.path / rotation.SERVER_RENEWALS} (`cotune client trust`) and add --anyway"
        )
    rotation.activate_keys(opened)
    typer.echo("the new keys are in use; stop `cotune server start` and start it again, within 30 days, to show the certificate")
    typer.echo(f"anyone who joins from now on needs the new federation.toml; its fingerprint: {opened.invitation.fingerprint}")


def _show_announced(opened: FederationFolder, key: str) -> None:
    from cotune.server.deployment import key_rotation as rotation

    typer.echo(f"the new keys are announced with every request from now on; the public half of the one that will sign: {key}")
    without = ", ".join(rotation.list_members_without_keys(opened))
    typer.echo(f"members that have not answered since: {without or 'none'}")
    typer.echo(f"give {opened.path / rotation.SERVER_RENEWALS} to those that no request reaches (`cotune client trust`)")
    typer.echo("then: cotune server renew-keys FED --switch")


app.command()(trail.verify_trail)
