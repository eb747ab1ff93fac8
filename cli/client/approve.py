"""Implement `cotune client approve`: show a plan and its differences from the last approved one, and approve it."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape

from cotune.cli.console import open_console
from cotune.client.consent.approvals import Approvals
from cotune.client.consent.plan_summary import diff_plans, summarize_plan
from cotune.client.site import Site


def approve_plan(site: Path, plan_id: str, *, asks: bool) -> None:
    """Show a plan that waits for approval, and approve it.

    Args:
        site: The site's folder.
        plan_id: The beginning of the plan's id; "": the only plan that waits.
        asks: Whether to ask before.

    Raises:
        typer.Exit: With 1, where the answer is no.
    """
    opened = Site(site.expanduser())
    console = open_console()
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
    if asks and not typer.confirm("Approve it?"):
        console.print("not approved: whenever it is asked for, it is declined")
        raise typer.Exit(1)
    approvals.approve(plan, f"cotune client approve {plan.plan_id[:12]}")
    console.print("approved: it is trained on when it is asked for next, which may take minutes, as far as the policy allows")
