"""Implement `cotune client init` and `join`: create a site, and run its node in a federation."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from cotune.cli.client.check import keep_site_options, show_broken
from cotune.cli.client.node_output import NodeOutput, limit_log
from cotune.cli.console import open_console
from cotune.cli.options import SiteOptions
from cotune.client.consent.approvals import Approvals
from cotune.client.consent.plan_summary import summarize_plan
from cotune.client.consent.policy_check import find_violations
from cotune.client.local_events import observe_client
from cotune.client.node.serve import run_node
from cotune.client.node.trust import Trust
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.site_setup import find_site_base, get_key_fingerprint, make_site
from cotune.plan.plan import Plan
from cotune.protocol.federation_file import read_invitation
from cotune.storage.files import atomic_write


def create_site(site: Path, name: str, *, device: str, key: Path | None) -> None:
    """Make a site, and print what comes next.

    Args:
        site: The folder to make.
        name: Of the organization.
        device: What it trains on.
        key: A private key to copy; None: a new one.
    """
    made = make_site(site.expanduser(), name, device=device, key=None if key is None else key.expanduser())
    folder = shlex.quote(str(made.folder))
    console = open_console()
    console.print(f"{escape(folder)} is the site of [bold]{escape(name)}[/bold]; it holds a private key, so keep it to yourself")
    console.print(f"1. send {folder}/node.pub to the coordinator, who invites you; SHA-256 of the key, to compare:")
    console.print(f"   {get_key_fingerprint(made)}")
    console.print("2. look at the federation.toml that you get:")
    console.print(f"   cotune client check {folder} federation.toml --data records.csv")
    console.print(f"3. change {folder}/policy.toml where it is stricter than you want; then")
    console.print(f"   cotune client join {folder} federation.toml")


def join_federation(site: Path, federation: Path, options: SiteOptions) -> None:
    """Approve a federation's plan and run the node until it is stopped.

    Args:
        site: The site's folder.
        federation: The federation.toml that the coordinator gave.
        options: Where records and base model are; kept in the site.
    """
    os.umask(0o077)  # what is written into a site is the organization's own
    limit_log()
    invitation = read_invitation(federation.expanduser())
    console = open_console()
    opened = keep_site_options(Site(site.expanduser()), invitation.plan, options)
    _show_plan(console, opened, invitation.plan)
    Approvals(opened).approve(invitation.plan, f"cotune client join {federation}")
    authority = opened.node.certificates
    atomic_write(authority, Trust.join(opened.folder, invitation).certificates())
    where = f"{escape(invitation.name)} at {escape(invitation.address)}"
    console.print(f"joining {where} as {escape(opened.organization)}; Ctrl-C leaves it")
    with observe_client(NodeOutput(console)):
        run_node(opened.folder, invitation.address, root_certificates=authority, key=opened.private_key)
    console.print("left the federation; what was spent is in the ledger, and the same command joins again")


def _show_plan(console: Console, site: Site, plan: Plan) -> None:
    """Print a summary of the plan and the policy's verdict; a site takes no part in a declined plan until it is allowed."""

    for line in summarize_plan(plan):
        console.print(escape(line))
    policy = site.policy()
    dataset = site.counted_dataset(plan)
    account = Account(plan, policy, site, dataset, draws=False)
    broken = tuple(find_violations(plan, policy, account.public_examples, account.hours()))
    if broken:
        show_broken(console, site, broken)
        console.print("[bold yellow]this plan is declined whenever it is asked for, until the policy allows it[/bold yellow]")
    else:
        find_site_base(plan, site.file)
