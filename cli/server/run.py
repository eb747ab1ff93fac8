"""`cotune server run`: the plan is carried out with the organizations that were invited."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import announce, open_console
from cotune.cli.options import FederationPath
from cotune.cli.plans.plan_options import Set
from cotune.cli.progress import showing_remote_progress
from cotune.flower.control_client import open_control
from cotune.plan.load import check_tables, parse_overrides, read_document
from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.documents.summary import RunSummary, read_summary
from cotune.reporting.formatting import size
from cotune.reporting.measures import measures_of
from cotune.server.deployment.execution.run_controller import (
    Executor,
    check_none_unfinished,
    is_superlink_kept_running,
    lock_runs,
    newest,
    retry_while_kept_running,
    run_to_completion,
    submit,
)
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.layout import FederationFiles
from cotune.server.runs.run_folder import RunFolder


def run(
    folder: FederationPath,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run, or follow it where it goes on.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Begin another run, and leave one that is not finished.")] = False,
    override: Set = None,
    out: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the run's folder in FED/runs; default: <time>-<plan>.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Hand the run over, and do not follow it.")] = False,
) -> None:
    """Run the plan with the invited organizations."""
    if resume and (new or override):
        raise typer.BadParameter("a run is continued as it was begun: --resume takes neither --new nor --set")
    _check_overrides(FederationFiles(folder).plan, override or ())
    announce(f"reading {folder}")
    federation = FederationFolder(folder)
    console = open_console()
    with lock_runs(federation), open_control(federation.superlink_address, federation.files.certificates.authority) as executor:
        kept_running = partial(is_superlink_kept_running, federation)
        if not resume:
            with showing_remote_progress(console) as notify:
                retry_while_kept_running(executor.running, kept_running, notify)  # raises where the server does not run
        played = newest(federation, out) if resume else _begin(console, federation, executor, override or [], out, leave=new)
        if detach:
            with showing_remote_progress(console) as notify:
                retry_while_kept_running(lambda: submit(played, executor), kept_running, notify)
            console.print(f"{escape(played.file.run)} is submitted: `cotune server run {folder} --resume` follows it")
            return
        with showing_remote_progress(console) as notify:
            run_to_completion(played, executor, notify, kept_running=kept_running)
    _show_result(console, played)


def _check_overrides(plan: Path, overrides: Sequence[str]) -> None:
    """Find a slip before anything heavy is imported. Raises PlanError."""
    if plan.is_file():
        check_tables(read_document(plan, overrides))
    else:
        check_tables(parse_overrides(overrides), partial=True)


def _begin(
    console: Console, federation: FederationFolder, executor: Executor, override: list[str], name: str | None, *, leave: bool
) -> RunFolder:
    from cotune.server.deployment.new_run import create_run  # loads PyTorch

    check_none_unfinished(federation, executor, leave=leave)
    begun = create_run(federation, override, name)
    if begun.plan.plan_id != federation.plan.plan_id:
        console.print(
            f"--set makes another plan ({begun.plan.plan_id[:12]}…) than organizations were given: each decides by its policy,"
            " and may have to approve it first"
        )
    return begun


def _show_result(console: Console, played: RunFolder) -> None:
    summary = read_summary(played.path / "summary.json")
    if summary["privacy"]["mode"] == "none":
        console.print("[bold red]No record-level differential privacy: the plan says privacy = none.[/bold red]")
    if summary["stopped"] is not None:
        console.print(f"[bold]The run was stopped: {escape(summary['stopped'])}.[/bold]")
    console.print(_headline([o["rounds"] for o in summary["organizations"]]))
    console.print(_organizations(summary))
    test = summary["test"]
    if test["federated"] is not None:
        measure = measures_of(summary)[0]
        reached = measure.show(test["federated"][measure.key])
        constant = "most frequent label" if measure.key == "accuracy" else measure.floor
        floor = f"{constant}: {measure.show(test['majority'][measure.key])}"
        console.print(f"{measure.name} {reached} on {test['examples']:,} test examples ({floor})")
    console.print(f"{len(summary['rounds'])} rounds, {size(summary['bytes']['up'])} up, {size(summary['bytes']['down'])} down")
    for file in ("report.html", "summary.json", "model", "adapter"):
        if (played.path / file).exists():
            console.print(f"{file:<13} {played.path / file}")


def _headline(rounds: Sequence[int]) -> str:
    """How many have a part in the model; loud where it is not all of them. rounds: of each, whose update was taken."""
    part = sum(1 for count in rounds if count)
    said = f"{part} of {len(rounds)} organizations are in this model"
    return said if part == len(rounds) else f"[bold red]{said}[/bold red]"


def _organizations(summary: RunSummary) -> Table:
    private = summary["privacy"]["mode"] != "none"
    table = Table("organization", header_style="bold", pad_edge=False, box=None)
    for heading in ("rounds", "weight", *(("ε stated",) if private else ()), "sent", "dropped", "quarantined", "has the model"):
        table.add_column(heading, justify="right")
    for o in summary["organizations"]:
        stated = ("–" if o["epsilon_spent"] is None else round_up(o["epsilon_spent"]),) if private else ()
        counts = (size(o["bytes_up"]), str(o["dropped"]), str(o["quarantined"]))
        weight = "–" if o["weight"] is None else f"{100 * o['weight']:.3g} %"
        table.add_row(escape(o["name"]), str(o["rounds"]), weight, *stated, *counts, "yes" if o["delivered"] else "not yet")
    return table
