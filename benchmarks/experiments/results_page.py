"""What the pages of experiments have in common: cells of a table, and text below a mark that is written again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

NARROW = Path(__file__).parents[1] / "tweets-narrow.toml"  # the plan that most experiments vary


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Return mean ± standard deviation (count) of some values; a dash for none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({len(values)})"


def publish(out: Path | None, mark: str, *parts: str) -> None:
    """Write paragraphs below a mark; what people have written above it stays.

    Args:
        out: The Markdown file; None: nothing is written.
        mark: The line that the measured part begins with.
        parts: The paragraphs and tables below it.
    """
    if out is not None:
        above = out.read_text(encoding="utf-8").split(mark)[0] if out.exists() else ""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(above + "\n\n".join([mark, *parts]) + "\n", encoding="utf-8")
