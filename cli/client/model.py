"""Implement `cotune client adapt` and `evaluate`: use the received model on the site's own records. Nothing leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import open_console, print_json
from cotune.cli.models.evaluate import figure, with_interval
from cotune.client.personalization.evaluation import STAYS, adapt_site, evaluate_site, open_final_model
from cotune.client.site import Site
from cotune.data.dataset import Dataset, DatasetManifest
from cotune.data.record_reading import read_records
from cotune.errors import DataError

_HEADINGS = {
    "majority": "always the most frequent class",
    "alone": "alone, without privacy",
    "received": "the received model",
    "adapted": "adapted to own records",
}


def adapt_model(site: Path, out: Path | None, plan: str, *, as_json: bool) -> None:
    """Adapt the received model to a site's own records, and print how well each method did.

    Args:
        site: The site's folder.
        out: The folder of the adapted model; None: adapted/<plan> in the site.
        plan: The first digits of a plan's id; "": the newest model.
        as_json: Whether a program reads the output.
    """
    opened = Site(site.expanduser())
    console = open_console()
    with open_console(stderr=True, quiet=as_json).status("fitting to own records"):
        done = adapt_site(opened, out, plan)
    found = done.adapted
    if as_json:
        about = {"method": found.method, "described": found.described, "tried": found.tried}
        together = {"model": str(done.folder), "records": done.records, **about, "sent": False, "epsilon": 0.0}
        print_json(together)
        return
    tried = ", ".join(f"{method} {figure(accuracy)}" for method, accuracy in found.tried.items())
    console.print(f"{done.records:,} own records; accuracy on parts that were not fitted to: {tried}")
    console.print(f"kept: [bold]{found.described}[/bold]")
    console.print("nothing was sent and no ε was spent. " + STAYS)
    console.print(f"model         {escape(str(done.folder))}")


def evaluate_model(site: Path, data: str | None, plan: str, *, as_json: bool) -> None:
    """Compare the received model with training alone on a site's own records, and print the result.

    Args:
        site: The site's folder.
        data: Labeled records that were in no run; None: a fifth of the site's own.
        plan: The first digits of a plan's id; "": the newest model.
        as_json: Whether a program reads the output.
    """
    opened = Site(site.expanduser())
    with open_console(stderr=True, quiet=as_json).status("fitting to own records"):
        new = None if data is None else _new_records(opened, data, open_final_model(opened, plan).plan.labels)
        found = evaluate_site(opened, new, plan)
    if as_json:
        print_json(found)
    else:
        _show(open_console(), found)


def _new_records(site: Site, data: str, labels: tuple[str, ...]) -> Dataset:
    """Read as the site's own records are."""

    try:
        document = DatasetManifest.model_validate_json(site.records.read_bytes())
    except (OSError, ValueError):
        raise DataError(
            f"{site.folder} does not say how its records are read: name them with `cotune client check`",
            code="data.not_described",
        ) from None
    source = data if data.startswith("package:") else str(Path(data).expanduser().resolve())
    records = read_records(document.data.model_copy(update={"source": source}), None, document.task)
    return Dataset(((records, np.arange(len(records))),), labels, document.task, lenient=True)


def _show(console: Console, found: dict[str, Any]) -> None:
    own = "new records" if not found["seen_by_received"] else "own records"
    console.print(
        f"[bold]{escape(found['organization'])}[/bold], plan {escape(found['plan'])} ({found['plan_id'][:12]}…):"
        f" {found['records']:,} {own} judge, {found['fitted_to']:,} were fitted to"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    for heading in ("accuracy (95 % interval)", "macro F1"):
        table.add_column(heading, justify="right")
    for name, metrics in found["columns"].items():
        table.add_row(_HEADINGS[name], with_interval(metrics["accuracy"], metrics["accuracy_interval"]), figure(metrics["f1"]))
    console.print(table)
    worth = found["worth"]
    low, high = worth["interval"]
    console.print(
        f"adapted minus alone: {worth['difference']:+.3f} ({low:+.3f} to {high:+.3f}). Worth it?"
        f" [bold]{worth['answer']}[/bold] ({worth['test']}, p = {worth['p']:.3f})"
    )
    for note in _notes(found):
        console.print(note)


def _notes(found: dict[str, Any]) -> list[str]:
    notes = []
    if found["worth"]["few"]:
        notes.append("fewer than 200 records judge: only large differences can be told from chance")
    if found["seen_by_received"]:
        bounded = "ε bounds how much of them it remembers" if found["private"] else "without privacy, so that this flatters it"
        notes.append(f"the received model was trained with these records, too: {bounded}; --data names others")
    return [*notes, "nothing was sent and no ε was spent: what was computed here is for you alone"]
