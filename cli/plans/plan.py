"""`cotune plan`: make a plan, look its keys up, and see what it will do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import announce, open_console, print_json
from cotune.cli.options import AsJson, Device, with_options
from cotune.cli.plans.plan_options import PlanOptions
from cotune.errors import PlanError
from cotune.plan.load import preset_names, preset_summary, preset_text, read_document
from cotune.plan.plan import Plan
from cotune.plan.reference import Key, explain_key, list_keys


def new(preset: Annotated[str, typer.Argument(help="Which preset to start from.")] = "tweets") -> None:
    """Print a preset plan: `cotune plan new tweets > my.toml`."""
    typer.echo(preset_text(preset), nl=False)


def names() -> None:
    """List the preset plans and what each is for."""
    width = max(map(len, preset_names()))
    for name in preset_names():
        typer.echo(f"{name:<{width}}  {preset_summary(name)}")


@with_options(PlanOptions)
def check(
    options: PlanOptions,
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="N1,N2",
            help="Records of each organization, such as 1000,5000,800; no data files are needed or read.",
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Forecast a plan: organizations, rounds, steps, noise, ε, bytes and time. Trains nothing."""
    began = time.perf_counter()
    if examples is None:
        options.check_files()
    elif any(value is not None for value in (options.data, options.clients, options.partition, options.by)):
        raise typer.BadParameter(
            "--examples says who has how many records, and none are read: it goes without --data, --clients, --partition and --by"
        )
    else:
        options.check_tables()
    announce(f"plan {options.source}: loading PyTorch, then base model and records", quiet=as_json)

    from cotune.cli.plans.forecast import make_forecast, show_forecast  # loads PyTorch

    with open_console(stderr=True, quiet=as_json).status("checking data, model and privacy"):
        found = make_forecast(options, examples, device, began)
    if as_json:
        print_json(found.as_dict())
    else:
        show_forecast(open_console(), found)


def pin(
    plan: Annotated[str, typer.Argument(help="A preset or a TOML file.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the base model, if it is not where the plan says; its name stays."),
    ] = None,
) -> None:
    """Print a plan with its base model's hashes: `cotune plan pin my.toml > pinned.toml`.

    With them, a server needs no weights of the base model.
    """
    read_document(plan)
    from cotune.plan.pinned_base import pin_base  # loads PyTorch

    typer.echo(pin_base(plan, model), nl=False)


def keys(
    find: Annotated[
        str | None, typer.Argument(metavar="[WORD]", help="Only keys that have this word in name or meaning.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every key of a plan: its type, default, bounds and meaning."""

    word = (find or "").casefold()
    found = [key for key in list_keys(Plan) if word in f"{key.name} {key.meaning}".casefold()]
    if not found:
        raise PlanError(f'no key has "{find}" in its name or meaning: `cotune plan keys` lists all', code="plan.unknown_key")
    if as_json:
        print_json([asdict(key) for key in found])
    else:
        show_keys(open_console(), found)


def explain(
    key: Annotated[str, typer.Argument(help="Such as privacy.epsilon; its last part, or the name of a table, will do.")],
    as_json: AsJson = False,
) -> None:
    """Explain what a key of a plan means and how to set it."""

    found = explain_key(key, Plan)
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        show_explained(open_console(), found)


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
