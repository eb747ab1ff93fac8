"""`cotune privacy verify`: recompute an exported ledger from the file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import open_console, print_json
from cotune.cli.options import AsJson
from cotune.errors import DataError
from cotune.privacy.accounting.display_rounding import round_up
from cotune.storage.json_documents import parse_json


def verify(
    export: Annotated[Path, typer.Argument(help="A file that `cotune client ledger SITE --export FILE` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Recompute an exported ledger: hash chain, charges, and ε by several accountants. Exits with 1 if it is wrong."""
    from cotune.privacy.ledger import verification  # loads PyTorch

    try:
        content = parse_json(export.expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{export} cannot be read ({error}): expected an exported ledger", code="data.unreadable_export"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{export} holds no table: expected an exported ledger", code="data.malformed_export")
    found = verification.verify_export(content)
    if as_json:
        print_json(found)
    else:
        _show(open_console(), found)
    if not found["valid"]:
        raise typer.Exit(1)


def _show(console: Console, found: dict[str, Any]) -> None:
    for table in found["collections"]:
        name = f"[bold]collection {escape(table['collection'])}[/bold]: " if table["collection"] else ""
        console.print(
            f"{name}ε {round_up(table['epsilon'])} by {table['composition']} at δ = {table['delta']:.1e}, stated"
            f" {round_up(table['epsilon_stated'])}"
        )
        console.print(_runs(table))
    if found["head"]:
        console.print(f"{found['entries']} entries, head of the log: {escape(found['head'])}")
    for problem in found["problems"]:
        console.print(f"[bold red]{escape(problem)}[/bold red]")
    verdict = "the export holds" if found["valid"] else "[bold red]the export does not hold[/bold red]"
    console.print(f"{verdict}; compare the head with one that was kept elsewhere")


def _runs(data: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("  run", no_wrap=True)
    for heading in ("ε by PLD", "at least", "ε by Rényi"):
        table.add_column(heading, justify="right")
    for run in data["runs"]:
        figures = (round_up(run[key]) for key in ("epsilon", "epsilon_at_least", "epsilon_renyi"))
        table.add_row(f"  {escape(run['plan_id'][:12])}…", *figures)
    return table
