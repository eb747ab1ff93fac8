"""`cotune simulate`: the main job, and the table that answers "is it worth joining?"."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import open_console, print_json
from cotune.cli.options import AsJson, with_options
from cotune.cli.plans.plan_options import PlanOptions
from cotune.cli.progress import showing_progress
from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.formatting import duration, size
from cotune.reporting.measures import measures_of
from cotune.reporting.verdict import (
    conclude_verdict,
    few_note,
    floor_name,
    is_personal,
    is_private,
    own_columns,
    partition_note,
    personal_note,
)

if TYPE_CHECKING:
    from cotune.simulations.run import Run


_WIDE = 90  # columns of a terminal, for two spaces between those of the verdict


@with_options(PlanOptions)
def simulate(
    options: PlanOptions,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/<time>-<plan>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder after its last finished round.")] = None,
    engine: Annotated[str | None, typer.Option(help="in-process, or ray (Flower's Simulation Runtime).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that train, each with an equal share of PyTorch's threads; 1: this one alone. The result is"
            " bit-identical to that of one process with the same number of threads. Also with --resume; not with ray."
        ),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Simulate a federation on this machine, and show whether joining pays off."""
    if resume is not None and (
        options.plan is not None or options.given or any(each is not None for each in (out, engine, device))
    ):
        raise typer.BadParameter("a run is continued as it was started: --resume takes no plan, engine, device or overrides")
    told = open_console(stderr=as_json)
    _begin(told, options, resume)
    from cotune.simulations import run as simulations  # loads PyTorch

    with showing_progress(told):
        if resume is not None:
            result = simulations.resume(resume, workers=workers)
        else:
            result = simulations.simulate(
                options.load(),
                out,
                engine=engine or "in-process",
                device=device or "auto",
                workers=workers,
                noted=partial(_note, told),
            )
    if as_json:
        print_json(result.summary.as_json())
    else:
        show(told, result)


def _begin(console: Console, options: PlanOptions, resume: Path | None) -> None:
    """A first sign of life, before torch is imported; for a new run once what it names is there."""
    if resume is not None:
        console.print(f"going on with {escape(str(resume))}")
        return
    options.check_files()
    console.print(f"plan {escape(options.source)}: loading PyTorch, then records and base model")


def _note(console: Console, notes: Sequence[str]) -> None:
    """Before anything is trained: so that a run with the wrong column, or a class in two spellings, can be stopped."""
    for note in notes:
        console.print(escape(note))


def show(console: Console, result: Run) -> None:
    """The tables at the end of a run."""
    summary = result.summary
    client_level = summary["client_privacy"]
    if summary["privacy"]["mode"] == "none":
        kind = "differential privacy" if client_level is None else "record-level differential privacy"
        console.print(f"[bold red]No {kind}: the plan says privacy = none.[/bold red]")
    if summary["stopped"] is not None:
        console.print(f"[bold]The run was stopped: {escape(summary['stopped'])}.[/bold]")
    console.print(
        f"[bold]is it worth joining?[/bold] {measures_of(summary)[0].name} on each organization's own held-out records; alone:"
        " without privacy"
    )
    console.print(_own_records(console, summary))
    _answer(console, summary)
    if summary.get("tasks"):
        console.print(_tasks(summary))
    console.print(_comparison(summary))
    console.print(_organizations(summary))
    for note in summary["data"]["notes"]:
        console.print(escape(note))
    traffic = f"{size(summary['bytes']['up'])} up, {size(summary['bytes']['down'])} down"
    effort = f"{duration(summary['seconds'])}, {size(summary['peak_memory_bytes'])} peak memory"
    if summary.get("peak_gpu_memory_bytes"):
        effort += f", {size(summary['peak_gpu_memory_bytes'])} of the GPU"
    console.print(f"{len(summary['rounds'])} rounds, {traffic}, {effort}")
    if client_level is not None:
        spent = f"ε {round_up(client_level['epsilon_spent'])} of {client_level['epsilon']:g} at δ = {client_level['delta']:g}"
        console.print(f"client-level privacy: {spent}, {client_level['rounds_charged']} rounds charged")
    for file in ("report.html", "summary.json", "sites/*/model" if is_personal(summary) else "model"):
        console.print(f"{file:<13} {result.folder / file}", soft_wrap=True)
    if summary["stopped"] is None and not is_personal(summary) and measures_of(summary)[0].key != "loss":
        tasks = summary.get("tasks")
        folder = result.folder / "model" / tasks[0]["name"] if tasks else result.folder
        console.print(f'next: cotune predict {shlex.quote(str(folder))} "a text"; docs/use.md says what else')


def _own_records(console: Console, summary: RunSummary) -> Table:
    """What each choice reaches on an organization's own held-out records, and whether joining and alone differ there."""
    columns = own_columns(summary)
    headings = {"majority": "majority", "alone_without_privacy": "alone", "plain": "plain", "adapted": "adapted"}
    headings |= {"alone": "alone, ε" if is_private(summary) else "alone, plan", "federated": "federated"}
    decides = measures_of(summary)[0]
    if decides.key != "accuracy":
        headings["majority"] = decides.floor
    narrow = console.width < _WIDE
    table = Table(header_style="bold", pad_edge=False, box=None, padding=(0, 1, 0, 0) if narrow else (0, 1))
    table.add_column("organization", overflow="fold")
    for heading in (*(headings[key] for key in columns), "gain", "records", "worth it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for o in summary["organizations"]:
        own = o["own"]
        worth = o["worth"]
        figures = [f"{own[key][decides.key]:.3f}" if own and own[key] else "–" for key in columns]
        gain = f"{worth['difference']:+.3f}" if worth else "–"
        answer = worth["answer"].removesuffix(" to tell") if worth else "–"
        table.add_row(escape(o["name"]), *figures, gain, f"{own['records'] if own else 0:,}", answer)
    return table


def _answer(console: Console, summary: RunSummary) -> None:
    """The verdict, and what it depends on; of the report's notes, the first ones."""
    verdict = conclude_verdict(summary)
    console.print(f"[bold]{verdict.answer}:[/bold] {escape(verdict.sentence)}")
    for note in personal_note(summary):
        console.print(escape(note))
    if summary["worth"] is not None:
        for note in (*few_note(summary), *partition_note(summary)):
            console.print(escape(note))


def _comparison(summary: RunSummary) -> Table:
    test = summary["test"]
    private = summary["privacy"]["mode"] != "none"
    table = Table(
        f"everybody's records mixed ({test['examples']:,} test examples)", header_style="bold", pad_edge=False, box=None
    )
    measures = measures_of(summary)
    for measure in measures:
        table.add_column("F1" if measure.key == "f1" else measure.key, justify="right")
    alone = "each organization alone, mean" + (" (same privacy)" if private else "")
    without = (test["alone_without_privacy"] or {}).get("mean")
    rows = [(floor_name(summary).lower(), test["majority"]), (alone, (test["alone"] or {}).get("mean"))]
    rows += [
        ("each organization alone, mean (without privacy)", without),
        ("federated, nothing personal", test.get("plain")),
        (f"federated ({'own models, mean of ' if is_personal(summary) else ''}this run)", test["federated"]),
        ("federated, adapted by each organization, mean", (test["adapted"] or {}).get("mean")),
        ("all data pooled, without privacy (the bound)", test["pooled"]),
    ]
    for name, metrics in rows:
        if metrics is not None:
            style = "bold" if name.startswith("federated") else None
            table.add_row(name, *(f"{metrics[key]:.3f}" for key in [each.key for each in measures]), style=style)
    return table


def _tasks(summary: RunSummary) -> Table:
    """What sharing the encoder changes for each of several tasks; negative transfer in red."""
    table = Table("task", "test records of", header_style="bold", pad_edge=False, box=None)
    for heading in ("together", "by itself", "gain", "records"):
        table.add_column(heading, justify="right")
    for task in summary["tasks"]:
        for name, found in (("everybody", task["all"]), *task["organizations"].items()):
            if found is None:
                continue
            single, gain = ("–", "–") if found["gain"] is None else (f"{found['single']:.3f}", f"{found['gain']:+.3f}")
            worse = found["gain"] is not None and found["gain"] < 0
            shown = f"[red]{gain}[/red]" if worse else gain
            table.add_row(escape(task["name"]), escape(name), f"{found['federated']:.3f}", single, shown, f"{found['records']:,}")
    return table


def _organizations(summary: RunSummary) -> Table:
    private = summary["privacy"]["mode"] != "none"
    table = Table("organization", header_style="bold", pad_edge=False, box=None)
    claim = summary["privacy"].get("claim")
    counted = "examples" if claim is None or claim["unit"] == "record" else f"{claim['unit']}s"
    for heading in (escape(counted), "rounds", *(("ε spent", "ε allowed") if private else ())):
        table.add_column(heading, justify="right")
    for o in summary["organizations"]:
        privacy = (round_up(o["epsilon_spent"]), f"{o['epsilon_allowed']:g}") if private else ()
        table.add_row(escape(o["name"]), f"{o['examples']:,}", str(o["rounds"]), *privacy)
    return table
