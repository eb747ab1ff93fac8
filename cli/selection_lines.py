"""What `cotune compare --private-selection` shows: how it begins and what is released, and nothing of single runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.privacy.rounding import round_up
from cotune.server.figures import percent

if TYPE_CHECKING:
    from cotune.simulations.selected import Selected


@contextmanager
def showing_selection(console: Console) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A listener for `select`, with a sign of life on a terminal. How many runs there are is a secret, so that nothing counts."""
    with console.status("checking plans") as status:

        def listen(event: str, fields: dict[str, Any]) -> None:
            if event == "selection_started":
                cost = f"ε = {round_up(fields['epsilon'])} at δ = {fields['delta']:.1e}"
                line = f"choosing among {fields['plans']} plans in {fields['folder']}: {cost} for what is released"
                console.print(line, soft_wrap=True, markup=False)
                status.update("playing a secret number of runs")

        yield listen


def show_selected(console: Console, found: Selected, folder: Path) -> None:
    """The table at the end, and what it promises."""
    from cotune.simulations.selected import statement_of

    table = Table(header_style="bold", pad_edge=False, box=None)
    for key in found.settings:
        table.add_column(escape(key), overflow="fold")
    for heading in ("accuracy", "macro F1", "ε", "δ"):
        table.add_column(heading, justify="right")
    figures = (percent(found.test["accuracy"]), percent(found.test["f1"]), round_up(found.epsilon), f"{found.delta:.1e}")
    table.add_row(*(escape(value) for value in found.settings.values()), *figures)
    console.print(table)
    for paragraph in statement_of(found):
        console.print(paragraph, markup=False)
    console.print(f"released      {folder}", soft_wrap=True, markup=False)
