"""`cotune client init | join | approve | sent`: an organization's way into a federation."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from cotune.cli.client.check import Collection, Data, Label, Model, SiteFolder, Text, Unit, keep_what_is_named, show_broken
from cotune.cli.screen import beginning, screen
from cotune.cli.trail import verify_sent
from cotune.client.training.observe import observe_client
from cotune.data.readers.sources import check_source
from cotune.errors import CotuneError
from cotune.privacy.accounting.rounding import round_up
from cotune.reporting.formatting import SPACE, duration, size
from cotune.storage.files import atomic_write

if TYPE_CHECKING:
    from cotune.client.site import Site
    from cotune.plan.schema import Plan


def init(
    site: Annotated[Path, typer.Argument(help="The folder to make.")],
    name: Annotated[str, typer.Option(help="Of the organization, such as hospital-a.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    key: Annotated[
        Path | None, typer.Option(help="A private key as `ssh-keygen -t ecdsa -b 384` makes it, to be copied.")
    ] = None,
) -> None:
    """Make an organization's site: a key pair, a strict policy and an empty ledger, for your eyes only."""
    beginning(f"making {site}")
    from cotune.client.site_setup import get_key_fingerprint, make_site

    made = make_site(site.expanduser(), name, device=device, key=None if key is None else key.expanduser())
    folder = shlex.quote(str(made.folder))
    console = screen()
    console.print(f"{escape(folder)} is the site of [bold]{escape(name)}[/bold]; it holds a private key, so keep it to yourself")
    console.print(f"1. send {folder}/node.pub to the coordinator, who invites you; SHA-256 of the key, to compare:")
    console.print(f"   {get_key_fingerprint(made)}")
    console.print("2. look at the federation.toml that you get:")
    console.print(f"   cotune client check {folder} federation.toml --data records.csv")
    console.print(f"3. change {folder}/policy.toml where it is stricter than you want; then")
    console.print(f"   cotune client join {folder} federation.toml")


def join(
    site: SiteFolder,
    federation: Annotated[Path, typer.Argument(help="The federation.toml that the coordinator gave you.")],
    data: Data = None,
    text: Text = None,
    label: Label = None,
    unit: Unit = None,
    collection: Collection = None,
    model: Model = None,
) -> None:
    """Approve the plan in a federation.toml, connect, and train when asked; stays until stopped with Ctrl-C or SIGTERM."""
    import logging
    import os

    check_source(data)
    beginning("loading PyTorch, then records and base model")
    from cotune.client.node.node import run_node
    from cotune.client.node.trust import Trust
    from cotune.client.policy_check import Approvals
    from cotune.client.site import Site
    from cotune.protocol.federation_file import read_invitation

    os.umask(0o077)  # what is written into a site is the organization's own
    logging.getLogger("cotune").setLevel(logging.ERROR)  # what people want to know is shown below, once
    invitation = read_invitation(federation.expanduser())
    console = screen()
    opened = keep_what_is_named(Site(site.expanduser()), invitation.plan, data, text, label, unit, collection, model)
    _show_plan(console, opened, invitation.plan)
    Approvals(opened).approve(invitation.plan, f"cotune client join {federation}")
    authority = opened.node.certificates
    atomic_write(authority, Trust.join(opened.folder, invitation).certificates())
    where = f"{escape(invitation.name)} at {escape(invitation.address)}"
    console.print(f"joining {where} as {escape(opened.organization)}; Ctrl-C leaves it")
    with observe_client(Shown(console)):
        run_node(opened.folder, invitation.address, root_certificates=authority, key=opened.private_key)
    console.print("left the federation; what was spent is in the ledger, and the same command joins again")


def _show_plan(console: Console, site: Site, plan: Plan) -> None:
    """What it would do, and what the policy says: anyone who joins a plan that is declined takes no part until it is allowed."""
    from cotune.client.account import Account
    from cotune.client.plan_summary import summarize_plan
    from cotune.client.policy_check import find_violations
    from cotune.client.site_setup import find_site_base

    for line in summarize_plan(plan):
        console.print(escape(line))
    policy = site.policy()
    holdings = site.counted(plan)
    account = Account(plan, policy, site, holdings, draws=False)
    broken = tuple(find_violations(plan, policy, account.public_examples, account.hours()))
    if broken:
        show_broken(console, site, broken)
        console.print("[bold yellow]this plan is declined whenever it is asked for, until the policy allows it[/bold yellow]")
    else:
        find_site_base(plan, site.file)


class Shown:
    """One line for each thing that happens at the node; why it is not connected, or sends nothing, is said until that changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._problem = ""
        self._withheld = ("", "")
        self._has_begun = False

    def __call__(self, what: str, about: dict[str, Any]) -> None:
        line = getattr(self, f"_{what}", lambda **_: None)(**about)
        if line is not None:
            with suppress(OSError):  # a closed pipe is no reason to stop training
                self._console.print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line.replace(SPACE, ' ')}")

    def _connected(self, node: int) -> str:
        self._problem = ""
        return "connected"

    def _disconnected(self, reason: str) -> str | None:
        known = self._problem
        self._problem = reason
        return None if known == reason else f"[yellow]not connected[/yellow]: {escape(reason)}; it is tried again and again"

    def _begun(self, round: str, trains: bool) -> str | None:
        if not trains or self._withheld[0] == round:
            return None  # it gets the finished model, or is asked again for what it has declined
        first = not self._has_begun
        self._has_begun = True
        return f"round {escape(round)} begins" + ("; first, records are encoded, which may take minutes" if first else "")

    def _again(self, round: str, reason: str) -> str:
        return f"[yellow]round {escape(round)} begins again[/yellow]: {escape(reason)}"

    def _dropped(self, round: str, reason: str) -> str:
        return f"round {escape(round)} is not answered: {escape(reason)}"

    def _answered(self, round: str, seconds: float, entry: dict[str, Any]) -> str | None:
        if entry.get("what") == "receipt":
            return f"the finished model is in {escape(str(entry.get('model')))}"
        if entry.get("what") != "update":
            return self._nothing_sent(round, str(entry.get("reason", "see the log")))
        self._withheld = ("", "")
        spent = "without privacy"
        if entry.get("epsilon_spent") is not None:
            spent = f"ε {round_up(entry['epsilon_spent'])} of {entry['epsilon_allowed']:g} spent"
        return f"round {escape(round)} is answered: {size(entry['bytes'])} sent after {duration(seconds)}, {spent}"

    def _nothing_sent(self, round: str, why: str) -> str | None:
        """Nothing where it was asked again, and has said so before."""
        known = self._withheld
        self._withheld = (round, why)
        if known == (round, why):
            return None
        told = ", for the same reason" if known[1] == why else f": {escape(why)}"
        return f"[yellow]round {escape(round)}: no update was sent[/yellow]{told}"


def approve(
    site: SiteFolder,
    plan_id: Annotated[str, typer.Argument(help="The beginning of the plan's id; without it, the only plan that waits.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show a plan that came, or how it differs from the one approved last, and approve it."""
    from cotune.client.plan_summary import diff_plans, summarize_plan
    from cotune.client.policy_check import Approvals
    from cotune.client.site import Site

    opened = Site(site.expanduser())
    console = screen()
    approvals = Approvals(opened)
    plan = approvals.find(plan_id)
    last = approvals.last()
    if plan.plan_id in approvals.ids():
        console.print(f"the plan {escape(plan.name)} ({plan.plan_id[:12]}…) is approved already")
        return
    for line in summarize_plan(plan):
        console.print(escape(line))
    if last is not None:
        console.print(f"what differs from {escape(last.name)} ({last.plan_id[:12]}…), approved last:")
        for line in diff_plans(last, plan):
            console.print(f"  {escape(line)}")
    if not yes and not typer.confirm("Approve it?"):
        console.print("not approved: whenever it is asked for, it is declined")
        raise typer.Exit(1)
    approvals.approve(plan, f"cotune client approve {plan.plan_id[:12]}")
    console.print("approved: it is trained on when it is asked for next, which may take minutes, as far as the policy allows")


def sent(
    site: SiteFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the signatures of requests and answers.")] = False,
    trail: Annotated[Path | None, typer.Option(help="Compare it with a run's trail.jsonl, from the coordinator.")] = None,
) -> None:
    """Show what was asked for and what has left this organization, and check that nothing was changed in the list."""
    from cotune.client.audit_log import AuditLog
    from cotune.client.site import Site

    if verify or trail is not None:
        verify_sent(Site(site.expanduser()), trail)
        return
    log = AuditLog(Site(site.expanduser()).folder)
    entries = log.entries()
    head = log.head
    if as_json:
        typer.echo(json.dumps({"entries": entries, "head": head}, indent=1, ensure_ascii=False))
        return
    console = screen()
    for entry in entries:
        console.print(escape(_line(entry).replace(SPACE, " ")))
    console.print(f"{len(entries)} lines, none changed; SHA-256 of the last: {head}")


def _line(entry: dict[str, Any]) -> str:
    when = str(entry.get("at", ""))[:16].replace("T", " ")
    round = entry.get("round", "")
    plan = f" {entry['plan']} ({entry['plan_id'][:12]}…)" if entry.get("plan_id") else ""
    if entry["what"] in ("update", "receipt"):
        epsilon = "" if entry.get("epsilon") is None else f", ε {round_up(entry['epsilon'])} stated"
        return f"{when} {entry['what']}{plan}, round {round}: {size(entry['bytes'])}{epsilon}, SHA-256 {entry['sha256'][:16]}…"
    if entry["what"] == "request":
        return f"{when} {_asked_for(entry)}{plan}, round {round}: signed by {str(entry.get('key'))[:16]}…"
    return f"{when} {entry['what']}{plan}, round {round}: {entry.get('reason') or entry.get('said', '')}"


def _asked_for(entry: dict[str, Any]) -> str:
    """A round to train, or the finished model, which comes as the last round's."""
    from cotune.protocol.signatures import FINISHED, RequestStatement

    try:
        kind = RequestStatement.parse(str(entry.get("statement"))).kind
    except CotuneError:  # of an earlier version
        return "request"
    return "request with the finished model" if kind == FINISHED else "request to train"
