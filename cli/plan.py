"""`cotune plan`: make a plan, and say what it will do.

What `cotune plan check` shows of a plan.

What `cotune plan keys` and `explain` show of a plan's keys.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.plan_options import AsJson, By, Clients, Data, Label, Model, Partition, PlanArgument, PlanOptions, Set, Task, Text
from cotune.cli.screen import beginning, screen
from cotune.errors import PlanError
from cotune.plan.load import preset_names, preset_summary, preset_text
from cotune.plan.reference import explain_key, list_keys
from cotune.plan.schema import Plan
from cotune.privacy.accounting.rounding import round_up
from cotune.reporting.formatting import duration, size

if TYPE_CHECKING:
    from cotune.plan.reference import Key
    from cotune.privacy.claim import Figures
    from cotune.simulations.forecast.expected import NewPolicy, OwnBound, Refusal
    from cotune.simulations.forecast.forecast import ClientForecast, Forecast


_RULE = "budget.epsilon_per_run"


def show_forecast(console: Console, seen: Forecast) -> None:
    """The tables and sentences."""
    plan = seen.plan
    console.print(f"[bold]{escape(plan.name)}[/bold]: base model {escape(plan.model.base)}")
    console.print(f"base model hash {escape(str(plan.model.base_hash))}", soft_wrap=True)
    tested = "no data were read" if seen.test_examples is None else f"{seen.test_examples:,} test examples"
    console.print(f"{len(plan.labels)} classes ({escape(', '.join(plan.labels))}), {tested}")
    for note in seen.notes:
        console.print(escape(note))
    console.print(_stages(seen))
    console.print(_organizations(seen))
    if plan.privacy == "none":
        kind = "differential privacy" if plan.client_privacy is None else "record-level differential privacy"
        console.print(f"[bold red]No {kind}: the plan says privacy = none.[/bold red]")
    if seen.figures is not None:
        _show_claim(console, seen.figures)
    if seen.client_privacy is not None:
        _show_client_privacy(console, seen.client_privacy)
    _show_new_policy(console, seen.new_policy, len(seen.organizations))
    console.print(f"{_time(seen)}nothing was trained")


def _time(seen: Forecast) -> str:
    """Of a simulation; of a federation nobody knows the machines."""
    if seen.seconds is None:
        return ""
    low = duration(seen.seconds.low)
    high = duration(seen.seconds.high)
    return f"about {low} to {high} for `cotune simulate` and its baselines on this machine; "


def _show_claim(console: Console, figures: Figures) -> None:
    """What the plan promises for each record, of the organization that spends most."""
    from cotune.privacy.claim import SMALL_DELTA, attack_line

    at_small_delta = round_up(figures.epsilon_at_small_delta)
    mu = round_up(figures.gaussian_mu)
    console.print(
        f"for each record: ε = {at_small_delta} at δ = {SMALL_DELTA:g}, Gaussian μ = {mu};"
        f" {attack_line(figures.true_positive_rate)}"
    )


def _show_client_privacy(console: Console, seen: ClientForecast) -> None:
    console.print(
        f"client-level privacy: ε {round_up(seen.epsilon_planned)} planned, noise multiplier {seen.noise_multiplier:.3f}; in each"
        f" round's mean of {seen.expected_organizations:g} organizations the noise has the norm {seen.noise:.3g}, where what they"
        f" sent has {seen.signal:.3g} at most (with the clip norm of the start)"
    )
    for paragraph in seen.statement:
        console.print(escape(paragraph))


def _show_new_policy(console: Console, said: NewPolicy, organizations: int) -> None:
    """What an organization whose policy is as `cotune client init` makes it will say, a line for each rule."""
    for rule in dict.fromkeys(refusal.rule for refusal in said.refused):
        first, *others = (refusal for refusal in said.refused if refusal.rule == rule)
        whose = "" if len(first.organizations) == organizations else f" of {_named(first.organizations)}"
        rest = [name for refusal in others for name in refusal.organizations]
        also = f"; by the same rule that of {_named(rest)}" if rest else ""
        line = f"a new policy{whose} declines this plan by the rule [bold]{escape(rule)}[/bold]: "
        console.print(line + escape(_bound(first, said) + also))
    if said.to_fill_in:
        console.print(
            f"a new policy allows nothing in {', '.join(said.to_fill_in)} yet: each organization adds what this plan asks for"
            " (`cotune client check` gives the commands), and approves the plan"
        )


def _bound(refusal: Refusal, said: NewPolicy) -> str:
    """Why the rule declines the plan and, where a smaller ε of the site's own is enough, the ε and σ that follow."""
    if refusal.rule != _RULE or not said.bounds:
        return refusal.problem
    problem = refusal.problem.partition(";")[0]
    spent = round_up(max(bound.epsilon for bound in said.bounds))
    return f"{problem}; with budget.own_epsilon = {said.own_epsilon:g} it spends ε = {spent} with {_noise(said.bounds)}"


def _noise(bounds: Sequence[OwnBound]) -> str:
    least, most = (choose(bound.noise_multiplier for bound in bounds) for choose in (min, max))
    return f"σ = {least:.3f}" if f"{least:.3f}" == f"{most:.3f}" else f"σ = {least:.3f} to {most:.3f}"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _stages(seen: Forecast) -> Table:
    table = Table("stage", box=None, header_style="bold", pad_edge=False)
    for heading in ("rounds", "steps per round", "shared parameters", "up per round", "down per round"):
        table.add_column(heading, justify="right")
    for s in seen.stages:
        table.add_row(s.mode, str(s.rounds), str(s.steps), f"{s.parameters:,}", size(s.bytes_up), size(s.bytes_down))
    return table


def _organizations(seen: Forecast) -> Table:
    private = seen.plan.privacy != "none"
    table = Table("organization", box=None, header_style="bold", pad_edge=False)
    for heading in ("examples", "batch", "steps", *(("σ", "ε planned", "ε allowed", "δ") if private else ())):
        table.add_column(heading, justify="right")
    for o in seen.organizations:
        figures = (
            (f"{o.noise_multiplier:.3f}", round_up(o.epsilon_planned or 0.0), f"{o.epsilon_allowed:g}", f"{o.delta:.1e}")
            if private
            else ()
        )
        table.add_row(escape(o.name), f"{o.examples:,}", f"{o.batch:.0f}", str(o.steps), *figures)
    return table


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
    """Say what a plan will do: organizations, rounds, steps, noise, ε, bytes and time; train nothing."""
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
            from cotune.simulations.forecast.forecast import forecast

            seen = forecast(options.load(), device, began)
        else:
            from cotune.simulations.forecast.expected import parse_examples
            from cotune.simulations.forecast.forecast import forecast_for

            seen = forecast_for(options.without_data().load(), parse_examples(examples), device)
    if as_json:
        from cotune.server.runs.results import to_json

        typer.echo(to_json(seen.as_dict()).decode())
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
    found = [key for key in list_keys(Plan) if word in f"{key.name} {key.meaning}".casefold()]
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

    found = explain_key(key, Plan)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False))
    else:
        show_explained(screen(), found)
