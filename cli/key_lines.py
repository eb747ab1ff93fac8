"""What `cotune plan keys` and `explain` show of a plan's keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # torch takes seconds to import: only the commands that need it pay
    from cotune.plan.keys import Key


_PARTS = ("strategy.weighting", "strategy.fusion", "strategy.server_optimizer", "strategy.client_term")


def show_keys(console: Console, keys: Sequence[Key]) -> None:
    """A table of all of them."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("key", no_wrap=True)
    for heading in ("type", "default", "bounds", "meaning"):
        table.add_column(heading, overflow="fold")
    for key in keys:
        table.add_row(*(escape(_plain(text)) for text in (key.name, key.type, key.default, key.bounds, key.meaning)))
    console.print(table)
    console.print("`cotune plan explain KEY` says how to set one; parts of a strategy have parameters of their own:")
    console.print("`cotune strategies NAME`")


def show_explained(console: Console, keys: Sequence[Key]) -> None:
    """Each with what it means and how it is set."""
    for key in keys:
        bounds = f", {key.bounds}" if key.bounds else ""
        about = f"{_plain(key.type)}{bounds}; {_default(key)}"
        console.print(f"[bold]{escape(key.name)}[/bold]: {escape(about)}", soft_wrap=True)
        console.print(f"  {escape(_plain(key.meaning))}", soft_wrap=True)
        console.print(f"  {escape(_how(key))}", soft_wrap=True)


def _default(key: Key) -> str:
    default = _plain(key.default)
    return default if default == "required" else f"default: {default}"


def _how(key: Key) -> str:
    """How a plan or a command line says it."""
    if key.name.startswith(_PARTS) and key.table:
        return f"--set {key.name}=NAME; `cotune strategies NAME` lists the parameters of one"
    within = key.name.removeprefix("train.")
    if within != key.name:
        return f"in a [[train]] table of the plan, or of the first one --set train.0.{within}={'{…}' if key.table else 'VALUE'}"
    if key.table and key.name != "train":
        return f"a table [{key.name}] of the plan, or --set {key.name}.KEY=VALUE"
    return f"--set {key.name}=VALUE"


def _plain(text: str) -> str:
    return text.replace("`", "")
