"""`cotune server run` and `status`: the plan is carried out, and where it stands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cotune.cli.plan_options import Set
from cotune.cli.progress import showing_remote_progress
from cotune.cli.screen import beginning, screen
from cotune.plan.load import check_tables, parse_overrides, read_document
from cotune.privacy.accounting.rounding import round_up
from cotune.reporting.documents.summary import RunSummary, read_summary
from cotune.reporting.formatting import instant, percent, size

if TYPE_CHECKING:  # torch takes seconds to import: only the commands that need it pay
    from cotune.server.deployment.federation import FederationFolder
    from cotune.server.deployment.run_controller import Executor
    from cotune.server.deployment.status import Status
    from cotune.server.runs.run_folder import RunFolder

Federation = Annotated[Path, typer.Argument(metavar="FED", help="The federation's folder.")]
_WATCH_SECONDS = 2.0
_MOST_REFUSED = 5  # members and addresses that are shown


def run(
    folder: Federation,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run, or follow it where it goes on.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Begin another run, and leave one that is not finished.")] = False,
    override: Set = None,
    out: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the run's folder in FED/runs; default: <time>-<plan>.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Hand the run over, and do not follow it.")] = False,
) -> None:
    """Carry out the plan with the organizations that were invited."""
    if resume and (new or override):
        raise typer.BadParameter("a run is continued as it was begun: --resume takes neither --new nor --set")
    _check_overrides(folder / "plan.toml", override or ())
    beginning(f"reading {folder}")
    from cotune.flower.control_client import open_control
    from cotune.server.deployment.federation import FederationFolder
    from cotune.server.deployment.run_controller import (
        is_superlink_kept_running,
        lock_runs,
        newest,
        retry_while_served,
        run_to_completion,
        submit,
    )

    federation = FederationFolder(folder)
    console = screen()
    with lock_runs(federation), open_control(federation.superlink_address, federation.certificates) as executor:
        served = partial(is_superlink_kept_running, federation)
        if not resume:
            with showing_remote_progress(console) as tell:
                retry_while_served(executor.running, served, tell)  # raises, in one sentence, where the server does not run
        played = newest(federation, out) if resume else _begin(console, federation, executor, override or [], out, leave=new)
        if detach:
            with showing_remote_progress(console) as tell:
                retry_while_served(lambda: submit(played, executor), served, tell)
            console.print(f"{escape(played.file.run)} is handed over: `cotune server run {folder} --resume` follows it")
            return
        with showing_remote_progress(console) as tell:
            run_to_completion(played, executor, tell, served=served)
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
    from cotune.server.deployment.new_run import create_run
    from cotune.server.deployment.run_controller import check_none_unfinished

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
        reached = percent(test["federated"]["accuracy"])
        constant = percent(test["majority"]["accuracy"])
        console.print(f"accuracy {reached} on {test['examples']:,} test examples (most frequent label: {constant})")
    console.print(f"{len(summary['rounds'])} rounds, {size(summary['bytes']['up'])} up, {size(summary['bytes']['down'])} down")
    for file in ("report.html", "summary.json", "model"):
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


def status(
    folder: Federation,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show the organizations, the newest run and the certificate; also while nothing runs."""
    if watch and as_json:
        raise typer.BadParameter("--watch is for people: --json prints once")
    from dataclasses import asdict

    from cotune.flower.control_client import open_control
    from cotune.server.deployment.federation import FederationFolder
    from cotune.server.deployment.status import connections, look

    federation = FederationFolder(folder)
    console = screen()
    with open_control(federation.superlink_address, federation.certificates) as asked:

        def now() -> Status:
            connected = connections(federation.members.all(), asked)
            return look(federation, connected, plays=connected is None or bool(asked.running()))

        if as_json:
            typer.echo(json.dumps(asdict(now()), indent=1, ensure_ascii=False))
            return
        if watch:
            _watch(console, now)
        else:
            console.print(_page(now()))


def _watch(console: Console, now: Callable[[], Status]) -> None:
    with suppress(KeyboardInterrupt), Live(_page(now()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_SECONDS)
            live.update(_page(now()), refresh=True)


def _page(found: Status) -> Group:
    runs = "runs" if found.server_reachable else "does not run"
    lines = [f"federation {escape(found.federation)}: the server {runs}"]
    if found.certificate_expires is not None:
        lines.append(f"certificate until {instant(found.certificate_expires)}")
    else:
        lines.append(f"[bold red]certificate: {escape(str(found.certificate_problem))}[/bold red]")
    return Group(*lines, *_run_lines(found), *_refused_lines(found), _members(found))


def _refused_lines(found: Status) -> list[str]:
    """Whom the public port has refused what it sent, the most often first."""
    shown = found.refused[:_MOST_REFUSED]
    left = found.refused[_MOST_REFUSED:]
    lines = [
        f"refused at the public port: {each.who if each.is_member else f'address {each.who}'}, {each.count} times,"
        f" last {instant(each.at)}: {each.reason}"
        for each in shown
    ]
    return [escape(line) for line in [*lines, *([f"and {len(left)} others"] if left else [])]]


def _run_lines(found: Status) -> list[str]:
    at = found.run
    if at is None:
        return ["no run yet"]
    accuracy = "" if at.accuracy is None else f", test accuracy {at.accuracy:.3f}"
    lines = [f"run {at.run}, plan {at.plan} ({at.plan_id[:12]}…), begun {instant(at.created)}"]
    lines.append(f"round {at.round} of {at.rounds}, {at.phase}{accuracy}")
    if at.round:
        members = [o for o in found.organizations if o.revoked is None or o.last_round]
        lines.append(f"{sum(1 for o in members if o.last_round)} of {len(members)} organizations are in this model")
    if at.reason is not None:
        lines.append(at.reason)
    if at.last_event is not None and at.last_at is not None:
        lines.append(f"last event: {at.last_event}, {instant(at.last_at)}")
    return [escape(line) for line in lines]


def _members(found: Status) -> Table:
    """Narrow enough for 80 columns: who was invited when, and with which key, is `list`'s to say."""
    table = Table(header_style="bold", pad_edge=False, box=None)
    table.add_column("organization", overflow="fold")
    table.add_column("connection")
    for heading in ("last round", "weight", "ε stated", "sent", "strikes"):
        table.add_column(heading, justify="right")
    table.add_column("last word", overflow="fold")
    for o in found.organizations:
        figures = (
            str(o.last_round or "–"),
            "–" if o.weight is None else f"{100 * o.weight:.3g} %",
            "–" if o.epsilon is None else round_up(o.epsilon),
            size(o.bytes_up),
            str(o.strikes or "–"),
        )
        table.add_row(escape(o.name), o.connection, *figures, escape(o.word))
    return table
