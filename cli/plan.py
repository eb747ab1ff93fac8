"""`cotune plan`: make a plan, and say what it will do."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from cotune.cli.forecast_lines import show_forecast
from cotune.cli.key_lines import show_explained, show_keys
from cotune.cli.plan_options import AsJson, By, Clients, Data, Label, Model, Partition, PlanArgument, PlanOptions, Set, Task, Text
from cotune.cli.screen import beginning, screen
from cotune.models.errors import PlanError
from cotune.plan.document import preset_names, preset_summary, preset_text
from cotune.plan.keys import explained, keys_of
from cotune.plan.schema import Plan

app = typer.Typer(help="Make and check plans.", no_args_is_help=True)


@app.command("new")
def new(preset: Annotated[str, typer.Argument(help="Which preset to start from.")] = "tweets") -> None:
    """Print a preset plan: `cotune plan new tweets > my.toml`."""
    typer.echo(preset_text(preset), nl=False)


@app.command("list")
def names() -> None:
    """Name the preset plans, and what each is for."""
    width = max(map(len, preset_names()))
    for name in preset_names():
        typer.echo(f"{name:<{width}}  {preset_summary(name)}")


@app.command("check")
def check(
    plan: PlanArgument = None,
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="N1,N2",
            help="Records of each organization, such as 1000,5000,800; no data files are needed or read.",
        ),
    ] = None,
    data: Data = None,
    task: Task = None,
    text: Text = None,
    label: Label = None,
    model: Model = None,
    clients: Clients = None,
    partition: Partition = None,
    by: By = None,
    override: Set = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what a plan will do: organisations, rounds, steps, noise, ε, bytes and time; train nothing."""
    began = time.perf_counter()
    options = PlanOptions(plan, data, task, text, label, model, clients, partition, by, override)
    if examples is None:
        options.check_files()
    elif any(value is not None for value in (data, clients, partition, by)):
        raise typer.BadParameter(
            "--examples says who has how many records, and none are read: it goes without --data, --clients, --partition and --by"
        )
    else:
        options.check_tables()
    beginning(f"plan {options.source}: loading PyTorch, then base model and records", quiet=as_json)
    console = screen()
    with screen(stderr=True, quiet=as_json).status("checking data, model and privacy"):
        if examples is None:
            from cotune.simulations.forecast import forecast

            seen = forecast(options.load(), device, began)
        else:
            from cotune.simulations.expected import parse_examples
            from cotune.simulations.forecast import forecast_for

            seen = forecast_for(options.without_data().load(), parse_examples(examples), device)
    if as_json:
        from cotune.server.summary import dumps

        typer.echo(dumps(seen.as_dict()).decode())
    else:
        show_forecast(console, seen)


@app.command("keys")
def keys(
    find: Annotated[
        str | None, typer.Argument(metavar="[WORD]", help="Only keys that have this word in name or meaning.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every key of a plan: its type, default, bounds and meaning."""
    from dataclasses import asdict

    word = (find or "").casefold()
    found = [key for key in keys_of(Plan) if word in f"{key.name} {key.meaning}".casefold()]
    if not found:
        raise PlanError(f'no key has "{find}" in its name or meaning: `cotune plan keys` lists all')
    if as_json:
        typer.echo(json.dumps([asdict(key) for key in found], indent=1, ensure_ascii=False))
    else:
        show_keys(screen(), found)


@app.command("explain")
def explain(
    key: Annotated[str, typer.Argument(help="Such as privacy.epsilon; its last part, or the name of a table, will do.")],
    as_json: AsJson = False,
) -> None:
    """Say what a key of a plan means, and how to set it."""
    from dataclasses import asdict

    found = explained(key, Plan)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False))
    else:
        show_explained(screen(), found)
