"""Implement `cotune client distill`: a student learns from teachers on the site's own records. Nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from cotune.cli.console import open_console, print_json
from cotune.client.distillation import PrivateDistillation, distill_privately, pin_student
from cotune.client.site import Site
from cotune.plan.load import load_plan


def distill_on_site(site: Path, plan: str, teachers: Sequence[str], out: Path, label_weight: float, *, as_json: bool) -> None:
    """Distill a student on a site's own records, and print what it cost.

    Args:
        site: The site's folder.
        plan: A TOML file or a preset, whose base model is the student.
        teachers: Folders of finished models, or hub ids.
        out: The student's folder.
        label_weight: Part of the records' own labels in what is learned.
        as_json: Whether a program reads the output.
    """
    work = PrivateDistillation(pin_student(load_plan(plan)), Site(site.expanduser()), teachers, label_weight, out)
    found = distill_privately(work)
    if as_json:
        print_json({**found, "model": str(out)})
        return
    console = open_console()
    console.print(f"{found['steps']:,} steps of DP-SGD are charged: ε = {found['epsilon']:.2f} of this plan; nothing was sent")
    console.print(f"the student: {escape(str(out))}")
