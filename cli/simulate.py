"""`cotune simulate`: the main job, and the table that answers "is it worth joining?"."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.screen import screen
from cotune.privacy.rounding import round_up
from cotune.server.figures import duration, size
from cotune.server.verdict import few_note, is_personal, is_private, judge, own_columns, partition_note

if TYPE_CHECKING:
    from cotune.plan.schema import Plan
    from cotune.simulations.simulate import Result

Text = str | None


def simulate(
    plan: Annotated[str | None, typer.Argument(help="A preset or a TOML file; default: tweets, or text with --data.")] = None,
    data: Annotated[
        Text,
        typer.Option(help="Your records: a CSV, TSV, JSON lines or Parquet file, or a folder with one per organisation."),
    ] = None,
    task: Annotated[Text, typer.Option(help="sequence-classification, token-classification or image-classification.")] = None,
    text: Annotated[Text, typer.Option(help="Column with the text, or with its words.")] = None,
    label: Annotated[Text, typer.Option(help="Column with the class, or with the words' tags.")] = None,
    model: Annotated[Text, typer.Option(help="Base model: a folder, a Hugging Face hub id or package:NAME.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many organisations the file is split over.")] = None,
    partition: Annotated[Text, typer.Option(help="iid, dirichlet:ALPHA, quantity:ALPHA, shards:K or column:NAME.")] = None,
    by: Annotated[
        Text, typer.Option(help="Column that names each record's organisation: short for --partition column:NAME.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the plan; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/<time>-<plan>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder after its last finished round.")] = None,
    engine: Annotated[Text, typer.Option(help="in-process, or ray (Flower's Simulation Runtime).")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
) -> None:
    """Simulate a federation on this machine, and see whether it pays off."""
    given = (plan, data, task, text, label, model, clients, partition, by, override, out, engine, device)
    if resume is not None and any(value is not None and value != [] for value in given):
        raise typer.BadParameter("a run is continued as it was started: --resume takes no plan, engine, device or overrides")
    if by is not None and (partition is not None or clients is not None):
        raise typer.BadParameter("--by says who holds which records: it goes without --partition and --clients")
    from cotune.cli.progress import showing_progress
    from cotune.simulations import simulate as simulations

    console = screen()
    if resume is not None:
        with showing_progress(console):
            result = simulations.resume(resume)
    else:
        chosen = _plan(plan, data, task, text, label, model, clients, partition if by is None else f"column:{by}", override or [])
        with showing_progress(console):
            result = simulations.simulate(chosen, out, engine=engine or "in-process", device=device or "auto")
    show(console, result)


def _plan(
    plan: Text,
    data: Text,
    task: Text,
    text: Text,
    label: Text,
    model: Text,
    clients: int | None,
    partition: Text,
    override: list[str],
) -> Plan:
    """Options are short for overrides; what is given with --set wins."""
    from cotune.plan.load import load_plan

    short = {
        "data.source": data,
        "task": task,
        "data.text": text,
        "data.label": label,
        "model.base": model,
        "simulation.clients": clients,
        "simulation.partition": partition,
    }
    options = [f"{key}={_quoted(value)}" for key, value in short.items() if value is not None]
    return load_plan(plan or ("tweets" if data is None else "text"), [*options, *override])


def _quoted(value: str | int) -> str:
    """A text option is a text, even where it looks like a number."""
    import json

    return json.dumps(value) if isinstance(value, str) else str(value)


def show(console: Console, result: Result) -> None:
    """The tables at the end of a run."""
    summary = result.summary
    client_level = summary["client_privacy"]
    if summary["privacy"]["mode"] == "none":
        kind = "differential privacy" if client_level is None else "record-level differential privacy"
        console.print(f"[bold red]No {kind}: the plan says privacy = none.[/bold red]")
    if summary["stopped"] is not None:
        console.print(f"[bold]The run was stopped: {escape(summary['stopped'])}.[/bold]")
    console.print(
        "[bold]is it worth joining?[/bold] accuracy on each organisation's own held-out records; alone: without privacy"
    )
    console.print(_own_records(summary))
    _answer(console, summary)
    console.print(_comparison(summary))
    console.print(_organisations(summary))
    for note in summary["data"]["notes"]:
        console.print(escape(note))
    traffic = f"{size(summary['bytes']['up'])} up, {size(summary['bytes']['down'])} down"
    effort = f"{duration(summary['seconds'])}, {size(summary['peak_memory_bytes'])} peak memory"
    console.print(f"{len(summary['rounds'])} rounds, {traffic}, {effort}")
    if client_level is not None:
        spent = f"ε {round_up(client_level['epsilon_spent'])} of {client_level['epsilon']:g} at δ = {client_level['delta']:g}"
        console.print(f"client-level privacy: {spent}, {client_level['rounds_charged']} rounds charged")
    for file in ("report.html", "summary.json", "sites/*/model" if is_personal(summary) else "model"):
        console.print(f"{file:<13} {result.folder / file}", soft_wrap=True)


def _own_records(summary: dict[str, Any]) -> Table:
    """What each choice reaches on an organisation's own held-out records, and whether joining and alone differ there."""
    columns, headings = own_columns(summary), {"majority": "majority", "alone_without_privacy": "alone", "adapted": "adapted"}
    headings |= {"alone": "alone, ε" if is_private(summary) else "alone, plan", "federated": "federated"}
    table = Table(header_style="bold", pad_edge=False, box=None)
    table.add_column("organisation", overflow="fold")
    for heading in (*(headings[key] for key in columns), "gain", "records", "worth it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for o in summary["organisations"]:
        own, worth = o["own"], o["worth"]
        figures = [f"{own[key]['accuracy']:.3f}" if own and own[key] else "–" for key in columns]
        gain = f"{worth['difference']:+.3f}" if worth else "–"
        answer = worth["answer"].removesuffix(" to tell") if worth else "–"
        table.add_row(escape(o["name"]), *figures, gain, f"{own['records'] if own else 0:,}", answer)
    return table


def _answer(console: Console, summary: dict[str, Any]) -> None:
    """The verdict, and what it depends on; of the report's notes, the first ones."""
    verdict = judge(summary)
    console.print(f"[bold]{verdict.answer}:[/bold] {escape(verdict.sentence)}")
    if summary["worth"] is not None:
        for note in (*few_note(summary), *partition_note(summary)):
            console.print(escape(note))


def _comparison(summary: dict[str, Any]) -> Table:
    test, private = summary["test"], summary["privacy"]["mode"] != "none"
    table = Table(
        f"everybody's records mixed ({test['examples']:,} test examples)", header_style="bold", pad_edge=False, box=None
    )
    for heading in ("accuracy", "precision", "recall", "F1"):
        table.add_column(heading, justify="right")
    alone = "each organisation alone, mean" + (" (same privacy)" if private else "")
    without = (test["alone_without_privacy"] or {}).get("mean")
    rows = [("majority class", test["majority"]), (alone, (test["alone"] or {}).get("mean"))]
    rows += [
        ("each organisation alone, mean (without privacy)", without),
        (f"federated ({'own models, mean of ' if is_personal(summary) else ''}this run)", test["federated"]),
        ("federated, adapted by each organisation, mean", (test["adapted"] or {}).get("mean")),
        ("all data pooled, without privacy (the bound)", test["pooled"]),
    ]
    for name, metrics in rows:
        if metrics is not None:
            style = "bold" if name.startswith("federated") else None
            table.add_row(name, *(f"{metrics[key]:.3f}" for key in ("accuracy", "precision", "recall", "f1")), style=style)
    return table


def _organisations(summary: dict[str, Any]) -> Table:
    private = summary["privacy"]["mode"] != "none"
    table = Table("organisation", header_style="bold", pad_edge=False, box=None)
    for heading in ("examples", "rounds", *(("ε spent", "ε allowed") if private else ())):
        table.add_column(heading, justify="right")
    for o in summary["organisations"]:
        privacy = (round_up(o["epsilon_spent"]), f"{o['epsilon_allowed']:g}") if private else ()
        table.add_row(escape(o["name"]), f"{o['examples']:,}", str(o["rounds"]), *privacy)
    return table
