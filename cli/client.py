"""`cotune client`: what an organisation looks at on its own machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.privacy.rounding import round_up
from cotune.server.figures import duration, size

if TYPE_CHECKING:
    from cotune.client.check import Checked

app = typer.Typer(no_args_is_help=True, help="An organisation's own side: its ledger, its policy, a check before it joins.")
SiteFolder = Annotated[Path, typer.Argument(help="The organisation's site: a folder with a site.json.")]


@app.command()
def ledger(
    site: SiteFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write everything that an auditor needs to this file, as JSON.")] = None,
) -> None:
    """Show the privacy that was spent, per data set and run, and what is left."""
    from cotune.client import bookkeeping
    from cotune.client.site import Site
    from cotune.models.durable import write_durably

    opened = Site(site.expanduser())
    if export is not None:
        write_durably(export.expanduser(), json.dumps(bookkeeping.export(opened), indent=1).encode())
    found = bookkeeping.overview(opened)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show_ledger(Console(highlight=False), found)


def _show_ledger(console: Console, found: dict[str, Any]) -> None:
    if not found["data_sets"]:
        console.print(f"{escape(found['organisation'])} has spent nothing: no data set was trained on with differential privacy")
    for data in found["data_sets"]:
        allowed = f"of {data['epsilon_total']:g} " if data["epsilon_total"] < 1e6 else ""  # a simulated organisation has no limit
        spent = f"ε {round_up(data['epsilon'])} {allowed}spent at δ = {data['delta']:.1e}"
        left = f", {data['epsilon_left']:.2f} left" if allowed else ""
        name, seen = f"[bold]data set {data['fingerprint'][:12]}…[/bold]", data["first_seen"][:10]
        console.print(f"{name}: {data['records']:,} records, first seen {seen}", soft_wrap=True)
        console.print(f"  {spent}{left}", soft_wrap=True)
        for other, common in data["shares_records_with"].items():
            console.print(f"  shares {common:,} records with {other[:12]}…, whose charges count here too")
        if data["unprotected"]:
            plans = ", ".join(dict.fromkeys(f"{left['plan']} ({left['what']})" for left in data["unprotected"]))
            times = f"{len(data['unprotected'])} times something left without any privacy"
            console.print(f"  [bold red]{times}: {escape(plans)}. No ε bounds that.[/bold red]", soft_wrap=True)
        if data["runs"]:
            console.print(_runs(data))
    if found["unassigned"]:
        console.print(f"{len(found['unassigned'])} charges of an older cotune name no data set, and count for every one")
    if found["head"]:
        console.print(f"head of the log: {found['head']}", soft_wrap=True)


def _runs(data: dict[str, Any]) -> Table:
    table = Table("  run", "plan", box=None, header_style="bold", pad_edge=False)
    for heading in ("rounds", "steps", "interrupted", "ε by itself", "last"):
        table.add_column(heading, justify="right")
    for run in data["runs"]:
        figures = (str(run["rounds"]), f"{run['steps']:,}", str(run["interrupted"]), round_up(run["epsilon"]))
        table.add_row(f"  {run['plan_id'][:12]}…", escape(run["plan"]), *figures, run["last"][:16].replace("T", " "))
    return table


@app.command()
def check(
    site: SiteFolder,
    plan: Annotated[str, typer.Argument(help="The plan as the coordinator runs it: a TOML file, or the folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON.")] = False,
) -> None:
    """Say what a plan would mean here: the policy's verdict, noise, ε, and time and memory of one real step."""
    from dataclasses import asdict

    from cotune.client.check import check as check_plan
    from cotune.client.site import Site
    from cotune.plan.load import load_plan

    console = Console(highlight=False)
    with Console(stderr=True, quiet=as_json).status("checking policy, data, model and gradients"):
        document = Path(plan) / "plan.toml" if (Path(plan) / "plan.toml").exists() else plan
        found = check_plan(load_plan(document, own_code=False), Site(site.expanduser()))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        _show_check(console, found)
    if found.declined:
        raise typer.Exit(1)


def _show_check(console: Console, found: Checked) -> None:
    console.print(f"[bold]{escape(found.organisation)}[/bold]: {found.examples:,} examples, device {found.device}")
    if found.warning:
        console.print(f"[bold yellow]{escape(found.warning)}[/bold yellow]", soft_wrap=True)
    if found.declined:
        console.print(f"[bold red]{escape(found.declined)}[/bold red]", soft_wrap=True)
        return
    console.print("the policy allows this plan")
    if found.noise_multiplier is None or found.epsilon is None or found.delta is None:
        console.print("[bold red]No differential privacy: the plan says privacy = none.[/bold red]")
        return
    total = f" of {found.epsilon_total:g} in total" if (found.epsilon_total or 0.0) < 1e6 else ""
    spent = f"ε {round_up(found.epsilon_spent or 0.0)}{total} is spent already"
    console.print(f"σ = {found.noise_multiplier:.3f}: it would spend ε = {found.epsilon:g} at δ = {found.delta:.1e}; {spent}")
    table = Table("stage", box=None, header_style="bold", pad_edge=False)
    for heading in ("rounds", "steps", "batch", "one step", "one round", "memory", "gradient error"):
        table.add_column(heading, justify="right")
    for s in found.stages:
        times = (duration(s.seconds), duration(s.seconds * s.steps))
        figures = (str(s.rounds), str(s.steps), f"{s.batch:.0f}", *times, size(s.peak_memory_bytes), f"{s.gradient_error:.0e}")
        table.add_row(s.mode, *figures)
    console.print(table)
    console.print("tried on made-up records of full length; nothing was trained on, charged or sent")


@app.command()
def policy(
    site: Annotated[Path | None, typer.Argument(help="Show this site's policy; without one, the strict default.")] = None,
) -> None:
    """Print a policy as TOML: the strict default, to be written to policy.toml in the site, or a site's own."""
    from cotune.client.site import Site
    from cotune.privacy.policy import Policy, dump_policy

    typer.echo(dump_policy(Policy() if site is None else Site(site.expanduser()).policy()), nl=False)
