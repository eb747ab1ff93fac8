"""`cotune client ledger | policy | renew-key | trust`, and the other commands of an organization."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.client import check as client_check
from cotune.cli.client import join as client_join
from cotune.cli.client import model as client_model
from cotune.cli.client.check import SiteFolder
from cotune.cli.screen import screen
from cotune.client.site_folder import SiteFolder as OpenedSite
from cotune.errors import PlanError, RunError
from cotune.plan.load import parse_value
from cotune.privacy.accounting.rounding import round_up
from cotune.privacy.policy import Policy, changed_policy, check_rules, dump_policy
from cotune.storage.files import atomic_write

app = typer.Typer(no_args_is_help=True, help="An organization's own side: its site, policy and ledger; joining a federation.")


@app.command()
def ledger(
    site: SiteFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write everything that an auditor needs to this file, as JSON.")] = None,
) -> None:
    """Show the privacy that was spent, over all runs and by each, and what is left."""
    from cotune.client import ledger_report as bookkeeping
    from cotune.client.site import Site

    opened = Site(site.expanduser())
    if export is not None:
        atomic_write(export.expanduser(), json.dumps(bookkeeping.export_ledger(opened), indent=1).encode())
    found = bookkeeping.summarize_ledger(opened)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show_ledger(screen(), found)


def _show_ledger(console: Console, found: dict[str, Any]) -> None:
    if not any(table["runs"] or table["unprotected"] for table in found["collections"]):
        console.print(f"{escape(found['organization'])} has spent nothing: no record was trained on with differential privacy")
    for table in found["collections"]:
        if table["collection"]:
            console.print(f"[bold]collection {escape(table['collection'])}[/bold], with all that was charged in none")
        _show_collection(console, table)
    if found["head"]:
        console.print(f"head of the log: {found['head']}")


def _show_collection(console: Console, table: dict[str, Any]) -> None:
    from cotune.privacy.claim import SMALL_DELTA, attack_line

    for data in table["data_sets"]:
        name = f"[bold]data set {data['fingerprint'][:12]}…[/bold]"
        seen = data["first_seen"][:10]
        console.print(f"{name}: {data['records']:,} records, first seen {seen}")
        for other, common in data["shares_records_with"].items():
            console.print(f"  shares {common:,} records with {other[:12]}…")
    if table["runs"]:
        allowed = f"of {table['epsilon_total']:g} " if table["epsilon_total"] < 1e6 else ""  # a simulated one has no limit
        how = "" if table["composition"] == "pld" else f" ({table['composition']})"  # over several runs it bounds more
        left = f", {math.floor(100 * table['epsilon_left']) / 100:.2f} left" if allowed else ""  # never more than there is
        console.print(f"ε {round_up(table['epsilon'])} {allowed}spent at δ = {table['delta']:.1e}{how}{left}")
        again = f"ε {round_up(table['epsilon_at_small_delta'])} at δ = {SMALL_DELTA:g}"
        console.print(f"{again}; {attack_line(table['true_positive_rate'])}")
    if table["unprotected"]:
        plans = ", ".join(dict.fromkeys(f"{left['plan']} ({left['what']})" for left in table["unprotected"]))
        times = f"{len(table['unprotected'])} times something left without any privacy"
        console.print(f"[bold red]{times}: {escape(plans)}. No ε bounds that.[/bold red]")
    if table["runs"]:
        console.print(_runs(table))


def _runs(data: dict[str, Any]) -> Table:
    """Narrow enough for 80 columns; a long name of a plan is folded."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("  run", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for heading in ("rounds", "steps", "cut off", "ε alone", "μ", "last"):
        table.add_column(heading, justify="right")
    for run in data["runs"]:
        counts = (str(run["rounds"]), f"{run['steps']:,}", str(run["interrupted"]))
        figures = (*counts, round_up(run["epsilon"]), round_up(run["gaussian_mu"]))
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
    settings = dict(_setting(text) for text in change or ())
    check_rules(settings)

    opened = None if site is None else OpenedSite(site.expanduser())
    before = Policy() if opened is None else opened.policy()
    if not change:
        typer.echo(dump_policy(before), nl=False)
        return
    if opened is None:
        raise PlanError("--set changes the policy of a site, and none was given: expected its folder before it")
    after = changed_policy(before, {rule: parse_value(text) for rule, text in settings.items()})
    atomic_write(opened.policy_file, dump_policy(after).encode())
    for rule in settings:
        table, _, key = rule.partition(".")
        old, new = (getattr(getattr(one, table), key) for one in (before, after))
        typer.echo(f"{rule}: {_shown(old)} → {_shown(new)}")


def _setting(text: str) -> tuple[str, str]:
    rule, equals, value = text.partition("=")
    if not equals:
        raise PlanError(f'the setting "{text}" is not understood: expected rule=value, such as training.max_rounds=50')
    return rule.strip(), value


def _shown(value: object) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)


@app.command("renew-key")
def renew_key(site: SiteFolder) -> None:
    """Make a new key for the node; it takes the place of the present one once the coordinator has accepted it."""
    from cotune.client.node.keys import renew_key as renew
    from cotune.client.site import Site

    file, fingerprint = renew(Site(site.expanduser()))
    typer.echo(f"give {file} to the coordinator, who accepts it by `cotune server accept-key`; it is no secret")
    typer.echo(f"SHA-256 of the new key, to be compared by telephone: {fingerprint}")
    typer.echo("until then the present key is used; afterwards a node that runs changes over by itself")


@app.command()
def trust(
    site: SiteFolder,
    renewal: Annotated[Path, typer.Argument(metavar="FILE", help="The server-renewals.jsonl that the coordinator gave you.")],
) -> None:
    """Believe the server's new keys, by a statement that the old ones have signed, where it did not come with a request."""
    from cotune.client.node.trust import Trust, record_renewals
    from cotune.client.site import Site
    from cotune.protocol.key_renewal import read_server_renewals

    folder = Site(site.expanduser()).folder
    renewals = read_server_renewals(renewal.expanduser())
    learned = record_renewals(folder, renewals)
    newest = Trust.read(folder).newest.signing_key
    if not learned and newest not in [each.about.new for each in renewals]:
        raise RunError(
            f"nothing in {renewal} follows from the key that the site trusts ({newest[:16]}…): expected all statements of its"
            " server, or the federation.toml again"
        )
    typer.echo(f"{len(learned)} statements were new; the server's newest key is {newest}")


for command in (
    client_join.init,
    client_check.check,
    client_join.join,
    client_join.approve,
    client_join.sent,
    client_model.adapt,
    client_model.evaluate,
):
    app.command()(command)
