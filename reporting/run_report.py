"""The report of a run: one HTML page that answers, for a manager and for an engineer, "is it worth joining?".

The page is made from the run's `summary.json` alone. It loads nothing (its content security policy forbids it), runs
no script, and follows the reader's light or dark setting. Names and labels come from other organizations, so everything
is escaped. Charts are SVG whose places are percentages: they stretch with the page while their text keeps its size, on
a phone as on a desk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotune.reporting.charts import accuracy_chart, epsilon_chart, label_bar, label_keys
from cotune.reporting.measures import measures_of
from cotune.reporting.pages import page_environment
from cotune.reporting.verdict import Summary, conclude_verdict, is_private, is_real, own_columns, results
from cotune.storage.files import atomic_write


def render_report(summary: Summary) -> str:
    """The page for one `summary.json` (schema 1), complete and self-contained.

    What was not measured is None there and is left out here, with a note. Raises KeyError or jinja2.UndefinedError
    where a field is absent.
    """
    page = page_environment().get_template("report.html.j2")
    measures = measures_of(summary)
    return page.render(
        summary=summary,
        private=is_private(summary),
        real=is_real(summary),
        verdict=conclude_verdict(summary),
        measures=measures,
        gain=lambda value: measures[0].show_gain(100 * value if measures[0].share else value),
        results=results(summary),
        own_columns={} if is_real(summary) else own_columns(summary),
        accuracy_chart=accuracy_chart(summary),
        epsilon_chart=epsilon_chart(summary),
        label_keys=() if is_real(summary) else label_keys(summary),
        label_bar=lambda organization: label_bar(summary, organization["labels"]),
        dropped=_dropped(summary),
        task_rows=_task_rows,
    )


def _task_rows(task: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(whose test records, the figures on them), of one of several tasks."""
    rows = [("everybody", task["all"]), *task["organizations"].items()]
    return [(name, found) for name, found in rows if found is not None]


def _dropped(summary: Summary) -> dict[tuple[str, str], list[int]]:
    """(organization, reason) -> the rounds: anyone who declines a plan does so in each of them."""
    found: dict[tuple[str, str], list[int]] = {}
    for entry in summary["rounds"]:
        for each in entry["dropped"]:
            found.setdefault((each["organization"], each["reason"]), []).append(entry["round"])
    return found


def write_report(summary: Summary, path: Path) -> None:
    """Write the page to `path` in one step: a reader finds the old page or the new one, never half of one."""
    # "replace": a name may hold half a surrogate pair, which JSON allows and UTF-8 does not
    atomic_write(path, render_report(summary).encode(errors="replace"))
