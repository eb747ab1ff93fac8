"""Implement `cotune client check`: show what joining a federation would mean for this organization."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import open_console, print_json
from cotune.cli.options import SiteOptions
from cotune.client.consent.policy_check import Violation
from cotune.client.consent.preflight import PreflightReport, run_preflight
from cotune.client.node.connector import ConnectionReport, check_connection, versions
from cotune.client.site import Site
from cotune.client.site_setup import set_base_model, set_prediction_sources, set_records
from cotune.data.skipped_records import format_left_out
from cotune.errors import PlanError
from cotune.plan.load import load_plan
from cotune.plan.plan import Plan
from cotune.privacy.accounting.display_rounding import round_up
from cotune.protocol.federation_file import Invitation, read_invitation
from cotune.protocol.version import PROTOCOL
from cotune.reporting.formatting import duration, size
from cotune.storage.json_documents import parse_toml


def check_site(site: Path, federation: str, options: SiteOptions, *, offline: bool, as_json: bool) -> None:
    """Check a plan at a site and print what was found.

    Args:
        site: The site's folder.
        federation: A federation.toml, a plan, or the folder of a run.
        options: Where records and base model are; kept in the site.
        offline: Whether the server is left alone.
        as_json: Whether a program reads the output.

    Raises:
        typer.Exit: With 1, where the plan is declined or the server does not let the organization in.
    """
    opened = Site(site.expanduser())
    console = open_console()
    invitation, plan = _read(federation)
    with open_console(stderr=True, quiet=as_json).status("checking policy, data, model and gradients"):
        opened = keep_site_options(opened, plan, options)
        found = run_preflight(plan, opened)
        tried = None
        if invitation is not None and not offline:
            tried = check_connection(opened, invitation.address, invitation.certificates)
    about = None if invitation is None else _about(invitation)
    if as_json:
        rules = [asdict(broken) | {"command": format_allowing_command(opened, broken)} for broken in found.broken]
        connection = None if tried is None else asdict(tried)
        together = {"federation": about, "versions": versions(), "connection": connection, **asdict(found), "broken": rules}
        print_json(together)
    else:
        if about is not None:
            _show_federation(console, about, versions())
        _show_check(console, opened, found, private=plan.privacy != "none")
        if tried is not None:
            _show_connection(console, tried)
    if found.declined or (tried is not None and tried.problem):
        raise typer.Exit(1)


def _read(source: str) -> tuple[Invitation | None, Plan]:
    """A federation.toml with its plan, or a plan by itself: a TOML file, or in the folder of a run."""

    path = Path(source).expanduser()
    if path.suffix == ".toml" and not path.exists():
        raise PlanError(
            f"{source} does not exist: expected the federation.toml that the coordinator gave you, or a plan",
            code="plan.missing_file",
        )
    document = path / "plan.toml" if (path / "plan.toml").exists() else path
    try:
        is_invitation = {"protocol", "server"} <= parse_toml(document.read_text(encoding="utf-8-sig")).keys()
    except (OSError, ValueError):
        is_invitation = document.name == "federation.toml"
    if not is_invitation:
        return None, load_plan(document if path.exists() else source, own_code=False)
    invitation = read_invitation(document)
    return invitation, invitation.plan


def keep_site_options(site: Site, plan: Plan, options: SiteOptions) -> Site:
    """Write the sources of records and base model that the command line gives to the site.

    Args:
        site: Of the organization.
        plan: Of the federation.
        options: Of the command line.

    Returns:
        The site, opened again.
    """
    set_records(
        site,
        plan,
        options.data,
        text=options.text,
        label=options.label,
        tasks=options.tasks,
        unit=options.unit,
        collection=options.collection,
    )
    if options.model is not None:
        site = set_base_model(site, plan, options.model)
    if options.public is None and options.own_model is None:
        return site
    return set_prediction_sources(site, plan, options.public, options.own_model)


def format_allowing_command(site: Site, broken: Violation) -> str | None:
    """The command that would allow what a rule does not."""
    if broken.suggested_value is None:
        return None
    setting = f"{broken.rule}={json.dumps(broken.suggested_value, ensure_ascii=False)}"
    return f"cotune client policy {shlex.quote(str(site.folder))} --set {shlex.quote(setting)}"


def _about(invitation: Invitation) -> dict[str, Any]:

    return {
        "name": invitation.name,
        "address": invitation.address,
        "fingerprint": invitation.fingerprint,
        "protocol": PROTOCOL,
        "plan": invitation.plan.name,
        "plan_id": invitation.plan.plan_id,
    }


def _show_federation(console: Console, about: dict[str, Any], found: dict[str, str]) -> None:
    where = escape(about["address"])
    plan = escape(about["plan"])
    console.print(f"[bold]{escape(about['name'])}[/bold] at {where}: plan {plan} ({about['plan_id'][:12]}…)")
    console.print(f"fingerprint of its federation.toml, to compare with the coordinator's: {about['fingerprint']}")
    installed = ", ".join(f"{name} {number}" for name, number in found.items())
    console.print(f"protocol {about['protocol']}; installed here: {installed}")


def _show_check(console: Console, site: Site, found: PreflightReport, *, private: bool) -> None:

    console.print(f"[bold]{escape(found.organization)}[/bold]: {found.examples:,} examples, device {found.device}")
    line = format_left_out(found.left_out, found.examples)
    if line is not None:
        console.print(escape(line))
    for warning in found.warnings:
        console.print(f"[bold yellow]{escape(warning)}[/bold yellow]")
    if found.declined:
        show_broken(console, site, found.broken)
        for problem in found.problems:
            console.print(f"[bold red]{escape(problem)}[/bold red]")
    else:
        console.print("the policy allows this plan")
    if private:
        _show_figures(console, found)
    else:
        console.print("[bold red]No differential privacy: the plan says privacy = none.[/bold red]")


def _show_figures(console: Console, found: PreflightReport) -> None:
    """Print what the plan would spend and need, even if it is declined, as that matters for changing a rule."""
    if found.epsilon is None or found.delta is None:
        return
    total = f" of {found.epsilon_total:g} in total" if (found.epsilon_total or 0.0) < 1e6 else ""
    spent = f"ε {round_up(found.epsilon_spent or 0.0)}{total} is spent already"
    noise = "no noise would do" if found.noise_multiplier is None else f"σ = {found.noise_multiplier:.3f}"
    console.print(f"{noise}: it would spend ε = {found.epsilon:g} at δ = {found.delta:.1e}; {spent}")
    if not found.stages:
        return
    table = Table("stage", box=None, header_style="bold", pad_edge=False)
    for heading in ("rounds", "steps", "batch", "one step", "one round", "memory", "gradient error"):
        table.add_column(heading, justify="right")
    for s in found.stages:
        times = (duration(s.seconds), duration(s.seconds * s.steps))
        figures = (str(s.rounds), str(s.steps), f"{s.batch:.0f}", *times, size(s.peak_memory_bytes), f"{s.gradient_error:.0e}")
        table.add_row(s.mode, *figures)
    console.print(table)
    console.print("tried on made-up records of full length; nothing was trained on, charged or sent")


def show_broken(console: Console, site: Site, rules: tuple[Violation, ...], otherwise: str = "") -> None:
    """Print every rule that does not allow a plan, with the command that would allow it.

    Args:
        console: To print to.
        site: Of the organization.
        rules: The broken rules.
        otherwise: Text to print if no rule is broken.
    """
    if not rules:
        console.print(f"[bold red]{escape(otherwise)}[/bold red]")
    for broken in rules:
        console.print(f"[bold red]declined by the rule {escape(broken.rule)}[/bold red]: {escape(broken.problem)}")
        command = format_allowing_command(site, broken)
        if command is not None:
            console.print(f"  to allow it: {escape(command)}")


def _show_connection(console: Console, tried: ConnectionReport) -> None:
    if tried.problem is not None:
        console.print(f"[bold red]not connected[/bold red]: {escape(tried.problem)}")
        return
    how = "the server lets this organization in"
    if tried.served:
        how = "the server answers; whether the node of this site is connected, it says itself (`cotune client join`)"
    console.print(f"{how}; the server's certificate is good for {tried.days_left} days")
