"""`cotune server init | start | renew | renew-keys`: the coordinator's federation, its certificates and its keys."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cotune.cli.console import announce, open_console
from cotune.cli.options import FederationPath
from cotune.cli.plans.plan_options import Set
from cotune.data.readers.sources import check_base, check_new, check_source
from cotune.errors import PlanError, RunError
from cotune.plan.load import load_plan, read_document
from cotune.server.deployment.execution.supervisor import supervise
from cotune.server.deployment.federation import FederationFolder, ServerConfig
from cotune.server.deployment.keys import certificates
from cotune.server.deployment.keys import key_rotation as rotation

Host = Annotated[list[str] | None, typer.Option("--host", help="Name or address that organizations reach this machine by.")]


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
    model: Annotated[
        Path | None,
        typer.Option(help="Your copy of the plan's base model; without weights, if the plan says its hashes (`plan pin`)."),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="The SuperLink keeps messages in memory: faster, but its restart costs the round.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N: for judging the model.")] = "auto",
) -> None:
    """Create a federation: certificates, a fully resolved plan, and the files to hand to organizations."""
    if port == superlink_port:
        raise PlanError(f"--port and --superlink-port are both {port}: expected two different ports", code="plan.same_ports")
    read_document(plan, override or [])
    check_source(None if test is None else str(test))
    check_base(None if model is None else str(model.expanduser().absolute()))
    check_new(folder)
    announce(f"making {folder}: loading PyTorch, then base model and test records")
    from cotune.server.deployment import creation  # loads PyTorch
    from cotune.server.runs.base_weights import describe_weights, holds_weights

    loaded = load_plan(plan, override or [])
    config = ServerConfig(
        name=name or loaded.name,
        hosts=tuple(dict.fromkeys(host)),
        listen=listen,
        port=port,
        superlink_port=superlink_port,
        database=not memory,
        test=None if test is None else test.expanduser().resolve(),
        base=None if model is None else model.expanduser().resolve(),
        device=device,
    )
    made = creation.create_federation(folder, loaded, config)
    console = open_console()
    console.print(f"{escape(str(made.path))} is the federation [bold]{escape(config.name)}[/bold]")
    console.print(escape(describe_weights(made.config.base, held=holds_weights(str(made.config.base or made.plan.model.base)))))
    console.print(f"labels: {escape(', '.join(made.plan.labels))}")
    console.print(f"give {escape(str(made.path / 'federation.toml'))} and JOIN.md to every organization;")
    console.print(f"its fingerprint, to be compared by telephone: {made.invitation.fingerprint}")
    console.print(f"next: cotune server start {escape(str(folder))}")


def start(folder: FederationPath) -> None:
    """Serve organizations until Ctrl-C: Flower's SuperLink, the TLS proxy in front of it, an executor for runs."""
    announce(f"starting {folder}; it takes some seconds until it is ready")

    console = open_console()
    supervise(
        FederationFolder(folder),
        lambda line: console.print(f"[dim]{datetime.now():%H:%M:%S}[/dim] {escape(line)}"),
    )


def renew(folder: FederationPath, host: Host = None) -> None:
    """Issue a new certificate for the same key. Organizations need to act only if the first host changes."""
    from cotune.server.deployment import creation  # loads PyTorch

    opened = FederationFolder(folder)
    rotation.finish_activation(opened)
    changed = creation.renew_server(opened, tuple(dict.fromkeys(host or ())))
    until = certificates.check_certificate(opened.certificates)
    typer.echo(f"the certificate is valid until {until:%Y-%m-%d}; stop `cotune server start` and start it again to show it")
    if changed:
        fingerprint = opened.invitation.fingerprint
        typer.echo(
            f"the address is another now: give federation.toml to every organization again; its fingerprint: {fingerprint}"
        )


def renew_keys(
    folder: FederationPath,
    switch: Annotated[bool, typer.Option("--switch", help="Put the announced keys into use.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also where members do not know them yet.")] = False,
) -> None:
    """Renew the signing key and the certificate authority: announce new ones, then use them (--switch)."""
    opened = FederationFolder(folder)
    if not switch:
        _show_announced(opened, rotation.announce_keys(opened).about.new)
        return
    rotation.finish_activation(opened)
    without = rotation.list_members_without_keys(opened)
    if without and not anyway:
        raise RunError(
            f"{', '.join(without)[:500]} have not answered since the new keys were announced: wait for their next round, or give"
            f" them {opened.files.server_renewals} (`cotune client trust`) and add --anyway",
            code="run.keys_not_known",
        )
    rotation.activate_keys(opened)
    typer.echo("the new keys are in use; stop `cotune server start` and start it again, within 30 days, to show the certificate")
    typer.echo(f"anyone who joins from now on needs the new federation.toml; its fingerprint: {opened.invitation.fingerprint}")


def _show_announced(opened: FederationFolder, key: str) -> None:

    typer.echo(f"the new keys are announced with every request from now on; the public half of the one that will sign: {key}")
    without = ", ".join(rotation.list_members_without_keys(opened))
    typer.echo(f"members that have not answered since: {without or 'none'}")
    typer.echo(f"give {opened.files.server_renewals} to those that no request reaches (`cotune client trust`)")
    typer.echo("then: cotune server renew-keys FED --switch")


def verify_trail(
    run: Annotated[Path, typer.Argument(help="The folder of a run, such as FED/runs/<run>.")],
    site_log: Annotated[Path, typer.Option("--site-log", help="An organization's audit.jsonl, or a copy of it.")],
) -> None:
    """Compare a run's trail with an organization's log: check signatures, list what either side lacks."""
    from cotune.cli.trail_verification import verify_run  # loads PyTorch

    verify_run(run, site_log)
