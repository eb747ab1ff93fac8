"""`cotune plan`: make a plan, and say what it will do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.screen import screen
from cotune.privacy.rounding import round_up
from cotune.server.figures import duration, size

if TYPE_CHECKING:  # torch takes seconds to import: only the commands that need it pay
    from cotune.privacy.claim import Figures
    from cotune.simulations.forecast import ClientForecast, Forecast

app = typer.Typer(help="Make and check plans.", no_args_is_help=True)

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the plan; repeatable.")]


@app.command("new")
def new(preset: Annotated[str, typer.Argument(help="Which preset to start from.")] = "tweets") -> None:
    """Print a preset plan: `cotune plan new tweets > my.toml`."""
    from cotune.plan.load import preset_text

    typer.echo(preset_text(preset), nl=False)


@app.command("list")
def names() -> None:
    """Name the preset plans."""
    from cotune.plan.load import preset_names

    typer.echo("\n".join(preset_names()))


@app.command("check")
def check(
    plan: Annotated[str, typer.Argument(help="A preset or a TOML file.")] = "tweets",
    override: Set = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Say what a plan will do: organisations, rounds, steps, noise, ε, bytes and time; train nothing."""
    from cotune.plan.load import load_plan
    from cotune.simulations.forecast import forecast

    loaded = load_plan(plan, override or [])
    console = screen()
    with console.status("checking data, model and privacy"):
        seen = forecast(loaded, device)
    _show(console, seen)


def _show(console: Console, seen: Forecast) -> None:
    plan = seen.plan
    console.print(f"[bold]{escape(plan.name)}[/bold]: base model {escape(plan.model.base)}")
    console.print(f"base model hash {escape(str(plan.model.base_hash))}", soft_wrap=True)
    console.print(f"{len(plan.labels)} classes ({escape(', '.join(plan.labels))}), {seen.test_examples:,} test examples")
    for note in seen.notes:
        console.print(escape(note))
    console.print(_stages(seen))
    console.print(_organisations(seen))
    if plan.privacy == "none":
        kind = "differential privacy" if plan.client_privacy is None else "record-level differential privacy"
        console.print(f"[bold red]No {kind}: the plan says privacy = none.[/bold red]")
    if seen.figures is not None:
        _show_claim(console, seen.figures)
    if seen.client_privacy is not None:
        _show_client_privacy(console, seen.client_privacy)
    console.print(f"about {duration(seen.seconds)} on this machine; nothing was trained")


def _show_claim(console: Console, figures: Figures) -> None:
    """What the plan promises for each record, of the organization that spends most."""
    from cotune.privacy.claim import SMALL_DELTA, attack_line

    at_small_delta, mu = round_up(figures.epsilon_at_small_delta), round_up(figures.gaussian_mu)
    console.print(
        f"for each record: ε = {at_small_delta} at δ = {SMALL_DELTA:g}, Gaussian μ = {mu};"
        f" {attack_line(figures.true_positive_rate)}"
    )


def _show_client_privacy(console: Console, seen: ClientForecast) -> None:
    console.print(
        f"client-level privacy: ε {round_up(seen.epsilon_planned)} planned, noise multiplier {seen.noise_multiplier:.3f}; in each"
        f" round's mean of {seen.expected_organisations:g} organisations the noise has the norm {seen.noise:.3g}, where what they"
        f" sent has {seen.signal:.3g} at most (with the clip norm of the start)"
    )
    for paragraph in seen.statement:
        console.print(escape(paragraph))


def _stages(seen: Forecast) -> Table:
    table = Table("stage", box=None, header_style="bold", pad_edge=False)
    for heading in ("rounds", "steps per round", "shared parameters", "up per round", "down per round"):
        table.add_column(heading, justify="right")
    for s in seen.stages:
        table.add_row(s.mode, str(s.rounds), str(s.steps), f"{s.parameters:,}", size(s.bytes_up), size(s.bytes_down))
    return table


def _organisations(seen: Forecast) -> Table:
    private = seen.plan.privacy != "none"
    table = Table("organisation", box=None, header_style="bold", pad_edge=False)
    for heading in ("examples", "batch", "steps", *(("σ", "ε planned", "ε allowed", "δ") if private else ())):
        table.add_column(heading, justify="right")
    for o in seen.organisations:
        figures = (
            (f"{o.noise_multiplier:.3f}", round_up(o.epsilon_planned or 0.0), f"{o.epsilon_allowed:g}", f"{o.delta:.1e}")
            if private
            else ()
        )
        table.add_row(escape(o.name), f"{o.examples:,}", f"{o.batch:.0f}", str(o.steps), *figures)
    return table
