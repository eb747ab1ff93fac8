"""Implement `cotune client ledger`: show the spent privacy, over all runs and by run, and what is left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import open_console, print_json
from cotune.client import ledger_report
from cotune.client.site_ledger import SiteWithLedger
from cotune.privacy.accounting.display_rounding import round_up
from cotune.privacy.claimed_guarantee import SMALL_DELTA, describe_attack
from cotune.storage.files import atomic_write


def show_ledger(site: Path, export: Path | None, *, as_json: bool) -> None:
    """Print the ledger of a site.

    Args:
        site: The site's folder.
        export: A file to write what an auditor needs to; None: none.
        as_json: Whether a program reads the output.
    """
    opened = SiteWithLedger(site.expanduser())
    if export is not None:
        atomic_write(export.expanduser(), json.dumps(ledger_report.export_ledger(opened), indent=1).encode())
    found = ledger_report.summarize_ledger(opened)
    if as_json:
        print_json(found)
    else:
        _show_ledger(open_console(), found)


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
        console.print(f"{again}; {describe_attack(table['true_positive_rate'])}")
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
