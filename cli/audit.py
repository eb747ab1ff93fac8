"""`cotune audit`: attack a plan's training, and compare what that proves with the claimed ε."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import announce, open_console, print_json
from cotune.cli.options import AsJson, with_options
from cotune.cli.plans.plan_options import PlanOptions
from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.formatting import SPACE, duration, percent, scientific

if TYPE_CHECKING:
    from cotune.simulations.auditing.audit import AuditResult
    from cotune.simulations.auditing.canary_sentences import Memorization

_SOME = 2_000
_MANY = 10_000
_FEWEST_SENTENCES = 32  # as of canaries
_AGAIN = (
    "Chance accuses a right engine as rarely as the confidence says: audit once more with --confidence 0.9999999, which it will"
    " hardly break."
)
_LIMITS = (
    "What this can and cannot see: a bound above the claim proves it false; one below it proves nothing, for bounds are"
    " sound but not tight: that of who sees every step comes nearest to the claim, the more so with more canaries. Noise that is"
    " 1 % too small shows in its test. Tried are a few adversarial states and records, not all there are. Audited are the steps"
    " from the records to the delta; not the sending or the ledger.",
    "The attack on the records is a plain one: an AUC near 0.5 is no proof that a better one would learn nothing.",
    "Nothing was released and no ledger was touched. The table is computed from the records: it is for the organization alone.",
)


@with_options(PlanOptions, without=("plan",))
def audit(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="PLAN_OR_RUN",
            help="A preset, a TOML file, or the folder of a run; default: tweets, or text with --data.",
            show_default=False,
        ),
    ] = None,
    *,
    options: PlanOptions,
    organization: Annotated[str | None, typer.Option(help="Whose records; default: the first organization's.")] = None,
    canaries: Annotated[
        int | None,
        typer.Option(
            min=32, max=100_000, help="How many, and at most how many records to attack; default: 2,000, with --tight 10,000."
        ),
    ] = None,
    sentences: Annotated[
        int,
        typer.Option(
            min=0, max=10_000, help="Canary sentences among texts that a model learns to write; 0: none, and no memorization."
        ),
    ] = 64,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many rounds to audit; default: all of the plan's.")] = None,
    tight: Annotated[
        bool,
        typer.Option(
            "--tight", help="Audit one step of all records instead of the plan's own steps: bounds come nearest to the claim."
        ),
    ] = False,
    confidence: Annotated[float, typer.Option(min=0.5, max=1.0, help="With which all bounds hold together; below 1.")] = 0.95,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a lower bound on the ε that training really spends; exits with 1 if it is above the claim."""
    if not confidence < 1:
        raise typer.BadParameter("expected a confidence below 1, such as 0.95: nothing is certain")
    if 0 < sentences < _FEWEST_SENTENCES:
        raise typer.BadParameter(f"expected --sentences 0, or at least {_FEWEST_SENTENCES}, got {sentences}: fewer show nothing")
    if tight and rounds is not None:
        raise typer.BadParameter("--tight audits one step in each stage of the plan: leave --rounds out")
    targets = canaries or (_MANY if tight else _SOME)
    options = replace(options, plan=subject)
    run = (Path(options.source) / "run.json").exists()
    if run and options.given:
        raise typer.BadParameter("a run is audited as it was: --set is for plans, and so are --data and the like")
    if not run:
        options.check_files()
    announce(f"{options.source}: loading PyTorch, then records and base model; then training with canaries", quiet=as_json)
    from cotune.simulations.auditing.audit import audit as run_audit  # loads PyTorch

    console = open_console()
    with open_console(stderr=True, quiet=as_json).status("training with canaries"):
        result = run_audit(
            Path(options.source) if run else options.load(),
            organization=organization,
            canaries=targets,
            rounds=rounds,
            tight=tight,
            confidence=confidence,
            device=device,
            sentences=sentences,
        )
    if as_json:
        print_json(result.as_dict())
    else:
        _show(console, result)
    if result.broken:
        raise typer.Exit(1)


def _show(console: Console, result: AuditResult) -> None:
    console.print(
        f"[bold]{escape(result.plan)}[/bold]: {escape(result.organization)}, {result.examples:,} examples, {_part(result)},"
        f" σ = {result.noise_multiplier:.3f}, {duration(result.seconds)}"
    )
    console.print("ε is at least, for any mechanism or for these steps; what no mistake would show:")
    table = Table("attack", header_style="bold", pad_edge=False, box=None)
    for heading in ("targets", "AUC", "any mechanism", "these steps", "can show"):
        table.add_column(heading, justify="right")
    for attack in result.attacks:
        bounds = (_down(bound) for bound in (attack.at_least_any, attack.at_least, attack.power))
        table.add_row(attack.name, f"{attack.targets:,}", f"{attack.auc:.3f}", *bounds)
    console.print(table)
    console.print(_noise(result))
    console.print(_states(result))
    if result.memorization is not None:
        console.print(_memorization(result.memorization))
    console.print(f"claim: ε = {round_up(result.epsilon)} at δ = {scientific(result.delta)}")
    sure = f"{100 * result.confidence:.12g}{SPACE}% confidence for all bounds together"
    for fault in result.faults:
        console.print(f"[bold red]The claim is broken: {escape(fault)}. Do not release what this trains.[/bold red]")
    if result.at_least > result.epsilon:
        console.print(
            f"[bold red]The claim is broken: this training spends ε of {_down(result.at_least)} at least ({sure}). Do not release"
            " what it trains.[/bold red]"
        )
    if result.broken:
        console.print(_AGAIN)
    else:
        share = percent(int(result.at_least / result.epsilon * 1000) / 1000)
        console.print(f"[bold]no contradiction[/bold]: ε is {_down(result.at_least)} at least, {share} of the claim ({sure})")
        if result.power <= result.epsilon:
            console.print(
                "No attack on so few targets could refute so large an ε: use more --canaries, or --set privacy.epsilon=1."
            )
    for limit in _LIMITS:
        console.print(limit)


def _part(result: AuditResult) -> str:
    """Which steps were audited."""
    if result.tight:
        return f"{result.steps} step{'s' * (result.steps > 1)} of all records"
    part = f"{result.rounds} of {result.rounds_planned} rounds" if result.rounds < result.rounds_planned else "all rounds"
    return f"{part}, {result.steps} steps"


def _noise(result: AuditResult) -> str:
    """Return what was drawn in the rounds, as one line: the smallest and the largest of them."""
    drawn = result.noise
    rounds = f"{len(drawn)} × {drawn[0].draws:,} draws" if len(drawn) > 1 else f"{drawn[0].draws:,} draws"
    least = min(noise.deviation for noise in drawn)
    most = max(noise.deviation for noise in drawn)
    spread = f"{least:.4f} to {most:.4f}" if len(drawn) > 1 else f"{least:.4f}"
    return (
        f"noise of {rounds}: {spread} of what is claimed, at most {min(noise.at_most for noise in drawn):.4f} where it is least"
    )


def _states(result: AuditResult) -> Table:
    """What a unit did in adversarial states: for each kind of state the worst over the rounds."""
    table = Table("state, worst round", header_style="bold", pad_edge=False, box=None)
    for heading in ("moves the sum by", "through others", "off the grid"):
        table.add_column(heading, justify="right")
    for state in dict.fromkeys(probe.state for probe in result.states):
        probes = [probe for probe in result.states if probe.state == state]
        contribution = max(probe.contribution for probe in probes)
        influence = max(probe.influence for probe in probes)
        off_grid = max(probe.off_grid for probe in probes)
        table.add_row(escape(state), f"{contribution:.6f} C", f"{influence:.1g} C", f"{off_grid:.0%}")
    return table


def _memorization(found: Memorization) -> str:
    """Return what the model knows of the canary sentences, in one line."""
    return (
        f"memorization: canary sentences have an exposure of {found.exposure:.2f} bits where they were trained on, at most"
        f" {found.highest:.2f}, and of {found.exposure_held_out:.2f} where they were not; a model that has learned nothing of"
        f" them gives 1.44, and {found.most:.2f} is the most that {found.references:,} other sentences can show"
    )


def _down(bound: float) -> str:
    """A lower bound never reads larger than it is."""
    return f"{int(bound * 100) / 100:.2f}"
