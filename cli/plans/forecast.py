"""Implement `cotune plan check`: show what a plan will do before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.plans.plan_options import PlanOptions
from cotune.models.base.quantization import explain_quantization
from cotune.plan.personal import explain
from cotune.plan.public import explain_predictions
from cotune.plan.stacking import explain_stacking
from cotune.privacy.accounting.display_rounding import round_up
from cotune.privacy.claimed_guarantee import SMALL_DELTA, Figures, describe_attack
from cotune.privacy.config import RecordPrivacy
from cotune.reporting.formatting import duration, size
from cotune.simulations.forecast.forecast import ClientForecast, Forecast, forecast, forecast_for
from cotune.simulations.forecast.members import NewPolicy, OwnBound, Refusal, parse_examples

_RULE = "budget.epsilon_per_run"


def make_forecast(options: PlanOptions, examples: str | None, device: str, began: float) -> Forecast:
    """Forecast the plan of a command line.

    Args:
        options: Of the command line, for the plan.
        examples: Records of each organization, such as "1000,5000,800"; None: according to the plan's data.
        device: On which training is timed.
        began: When the command started, by `time.perf_counter`.
    """
    if examples is None:
        return forecast(options.load(), device, began)
    return forecast_for(options.without_data().load(), parse_examples(examples), device)


def show_forecast(console: Console, seen: Forecast) -> None:
    """The tables and sentences."""
    plan = seen.plan
    quantized = explain_quantization(plan.model.quantization)
    console.print(f"[bold]{escape(plan.name)}[/bold]: base model {escape(plan.model.base)}{quantized}")
    console.print(f"base model hash {escape(str(plan.model.base_hash))}", soft_wrap=True)
    console.print(f"of its files but the weights {escape(str(plan.model.config_hash))}", soft_wrap=True)
    tested = "no data were read" if seen.test_examples is None else f"{seen.test_examples:,} test examples"
    classes = f"{len(plan.labels)} classes ({escape(', '.join(plan.labels))}), " if plan.labels else ""
    console.print(f"{classes}{tested}")
    for note in seen.notes:
        console.print(escape(note))
    stays = explain(plan.personal, private=isinstance(plan.privacy, RecordPrivacy))
    if stays is not None:
        console.print(stays)
    if plan.model.members:
        console.print(escape(explain_stacking(plan.model.members, private=isinstance(plan.privacy, RecordPrivacy))))
    if plan.shares_predictions:
        console.print(escape(explain_predictions(plan.public, private=isinstance(plan.privacy, RecordPrivacy))))
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
    if seen.time is None:
        return ""
    low = duration(seen.time.seconds.low)
    high = duration(seen.time.seconds.high)
    return (
        f"about {low} to {high} for `cotune simulate` and its baselines on this machine, as timed on {seen.time.timed_records:,}"
        f" of {seen.time.records:,} records; "
    )


def _show_claim(console: Console, figures: Figures) -> None:
    """Print what the plan promises for each record, for the organization that spends most."""

    at_small_delta = round_up(figures.epsilon_at_small_delta)
    mu = round_up(figures.gaussian_mu)
    console.print(
        f"for each record: ε = {at_small_delta} at δ = {SMALL_DELTA:g}, Gaussian μ = {mu};"
        f" {describe_attack(figures.true_positive_rate)}"
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
    up = f"up per round ({seen.plan.wire})"
    down = "down per round" if seen.plan.wire_down == "float32" else f"down per round but the first ({seen.plan.wire_down})"
    for heading in ("rounds", "steps per round", "shared parameters", up, down):
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
