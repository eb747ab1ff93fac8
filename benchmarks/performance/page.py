"""Make docs/results/performance.md, and the pictures beside it, from performance.json.

python benchmarks/performance/page.py docs/results/performance.json docs/results/performance.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import Curve
from plot import draw

MARKER = "<!-- below: written by benchmarks/performance/run.py -->"
_READING = """\
# Performance

What cotune costs, beside what one would use instead and beside what cannot be undercut, measured in the same run by `make bench`
(`make bench ONLY=ledger` for one; at most half an hour in all on two idle cores). Ratios count: absolute times are of the machine
below. CPU time of one thread is the main figure. Goals that are missed are in the table like those that are reached.
"""
_HEADINGS = ("what", "contender", "figure", "±", "ratio", "goal", "reached")


def write_page(source: Path, page: Path) -> None:
    """Write the page, and a picture for each benchmark with curves. What stands above the marker is by people and stays."""
    found = json.loads(source.read_text(encoding="utf-8"))
    reading = page.read_text(encoding="utf-8").split(MARKER)[0].rstrip() if page.exists() else _READING.rstrip()
    page.write_text("\n".join([reading, "", MARKER, "", *_body(found)]) + "\n", encoding="utf-8")
    for name, entry in found["benchmarks"].items():
        if curves := _curves(entry):
            (page.parent / f"{name}.svg").write_text(draw(curves), encoding="utf-8")


def _body(found: Mapping[str, Any]) -> Iterator[str]:
    benchmarks = sorted(found["benchmarks"].items(), key=lambda item: item[1]["number"])
    goals = [row["reached"] for _, entry in benchmarks for row in entry["rows"] if row["reached"] is not None]
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"Machine: {found['machine']}. Versions: {packages}."
    yield ""
    yield f"**{sum(goals)} of {len(goals)} goals reached.**"
    for name, entry in benchmarks:
        yield from ["", f"## {entry['title']}", ""]
        yield from _about(entry["about"])
        yield f"`make bench ONLY={name}`, {entry['at'][:10]}, commit {entry['commit']}, {entry['seconds']} s, {_load(entry)}."
        yield from ["", f"| {' | '.join(_HEADINGS)} |", "|---|---|---:|---:|---:|---|---|"]
        yield from map(_row, entry["rows"])
        if _curves(entry):
            yield from ["", f"![{entry['title']}]({name}.svg)"]
        for contender, reason in entry["failed"].items():
            yield from ["", f"Left out: {contender} ({_cell(reason)})."]


def _curves(entry: Mapping[str, Any]) -> list[Curve]:
    """The curves of a benchmark; entries of earlier versions have none."""
    return [Curve(**{**curve, "points": tuple(map(tuple, curve["points"]))}) for curve in entry.get("curves", [])]


def _about(text: str) -> Iterator[str]:
    """The module's docstring: what is compared, and why that is fair."""
    yield from text.strip().splitlines()
    yield ""


def _load(entry: Mapping[str, Any]) -> str:
    before, after = entry["load"]
    return f"{before:g} processes ready to run when it began and {after:g} when it ended, its own among them"


def _row(row: Mapping[str, Any]) -> str:
    spread = "" if row["spread"] is None else f"{100 * row['spread']:.0f} %"
    ratio = "" if row["ratio"] is None else f"{_number(row['ratio'])} × {row['against']}"
    reached = {True: "yes", False: "**no**", None: ""}[row["reached"]]
    what = f"{row['what']} ({row['note']})" if row["note"] else row["what"]
    figure = "–" if row["figure"] is None else f"{_number(row['figure'])} {row['unit']}".strip()
    cells = (what, row["contender"], figure, spread, ratio, row["goal"], reached)
    return f"| {' | '.join(map(_cell, cells))} |"


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    write_page(Path(sys.argv[1]), Path(sys.argv[2]))
