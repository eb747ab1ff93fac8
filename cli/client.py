"""`cotune client ledger | policy`, and the other commands of an organisation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli import client_check, client_join
from cotune.cli.client_check import SiteFolder
from cotune.cli.screen import screen
from cotune.privacy.rounding import round_up

app = typer.Typer(no_args_is_help=True, help="An organisation's own side: its site, policy and ledger; joining a federation.")


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
        _show_ledger(screen(), found)


def _show_ledger(console: Console, found: dict[str, Any]) -> None:
    if not found["data_sets"]:
        console.print(f"{escape(found['organisation'])} has spent nothing: no data set was trained on with differential privacy")
    for data in found["data_sets"]:
        allowed = f"of {data['epsilon_total']:g} " if data["epsilon_total"] < 1e6 else ""  # a simulated organisation has no limit
        how = "" if data["composition"] == "pld" else f" ({data['composition']})"  # over several runs it bounds more, and says so
        spent = f"ε {round_up(data['epsilon'])} {allowed}spent at δ = {data['delta']:.1e}{how}"
        left = f", {math.floor(100 * data['epsilon_left']) / 100:.2f} left" if allowed else ""  # never more than there is
        name, seen = f"[bold]data set {data['fingerprint'][:12]}…[/bold]", data["first_seen"][:10]
        console.print(f"{name}: {data['records']:,} records, first seen {seen}")
        console.print(f"  {spent}{left}")
        for other, common in data["shares_records_with"].items():
            console.print(f"  shares {common:,} records with {other[:12]}…, whose charges count here too")
        if data["unprotected"]:
            plans = ", ".join(dict.fromkeys(f"{left['plan']} ({left['what']})" for left in data["unprotected"]))
            times = f"{len(data['unprotected'])} times something left without any privacy"
            console.print(f"  [bold red]{times}: {escape(plans)}. No ε bounds that.[/bold red]")
        if data["runs"]:
            console.print(_runs(data))
            worst = max(data["runs"], key=lambda run: float(run["true_positive_rate"]))
            share = f"at most {math.ceil(1000 * worst['true_positive_rate']) / 10:g} % of the members"
            console.print(
                f"  from any one run, an attack with 1 % false alarms finds {share} (μ {round_up(worst['gaussian_mu'])})"
            )
    if found["unassigned"]:
        console.print(f"{len(found['unassigned'])} charges of an older cotune name no data set, and count for every one")
    if found["head"]:
        console.print(f"head of the log: {found['head']}")


def _runs(data: dict[str, Any]) -> Table:
    """Narrow enough for 80 columns; a long name of a plan is folded."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("  run", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for heading in ("rounds", "steps", "cut off", "ε alone", "last"):
        table.add_column(heading, justify="right")
    for run in data["runs"]:
        figures = (str(run["rounds"]), f"{run['steps']:,}", str(run["interrupted"]), round_up(run["epsilon"]))
        table.add_row(f"  {run['plan_id'][:12]}…", escape(run["plan"]), *figures, run["last"][:10])
    return table


@app.command()
def policy(
    site: Annotated[Path | None, typer.Argument(help="Show this site's policy; without one, the strict default.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="RULE=VALUE", help="Change a rule of the site's policy; repeatable.")
    ] = None,
) -> None:
    """Print a policy as TOML, the strict default or a site's own; with --set, change the site's."""
    from cotune.client.site import Site
    from cotune.models.durable import write_durably
    from cotune.models.errors import PlanError
    from cotune.plan.load import value_of
    from cotune.privacy.policy import Policy, changed_policy, dump_policy

    opened = None if site is None else Site(site.expanduser())
    before = Policy() if opened is None else opened.policy()
    if not change:
        typer.echo(dump_policy(before), nl=False)
        return
    if opened is None:
        raise PlanError("--set changes the policy of a site, and none was given: expected its folder before it")
    settings = dict(_setting(text) for text in change)
    after = changed_policy(before, {rule: value_of(text) for rule, text in settings.items()})
    write_durably(opened.folder / "policy.toml", dump_policy(after).encode())
    for rule in settings:
        table, _, key = rule.partition(".")
        old, new = (getattr(getattr(one, table), key) for one in (before, after))
        typer.echo(f"{rule}: {_shown(old)} → {_shown(new)}")


def _setting(text: str) -> tuple[str, str]:
    from cotune.models.errors import PlanError

    rule, equals, value = text.partition("=")
    if not equals:
        raise PlanError(f'the setting "{text}" is not understood: expected rule=value, such as training.max_rounds=50')
    return rule.strip(), value


def _shown(value: object) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)


for command in (client_join.init, client_check.check, client_join.join, client_join.approve, client_join.sent):
    app.command()(command)
