"""Render the page of a comparison: a table and curves for each facet, in the style of the report of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from cotune.reporting.charts import COLORS, MOST_DOTS, Chart, Key, Line, Point, Scale, round_ticks, value_scale, value_ticks
from cotune.reporting.comparison_statistics import Combination, Comparison, Estimate, Measured, Settings, estimate
from cotune.reporting.measures import Measure, get_measures
from cotune.reporting.pages import page_environment
from cotune.reporting.privacy_statement import together_statement
from cotune.storage.files import atomic_write

_NAME = "compare.html.j2"
_ENOUGH_SEEDS = 5
CAVEATS = (
    "One seed has the same initial model, the same partition, the same organizations asked in each round and, without privacy,"
    " the same order of batches for every row, so that differences are taken seed by seed.",
    "± is half of a 95 % Student t interval of the mean over the seeds. p is that of a paired t-test, corrected by Holm's method"
    " for the number of rows that one table compares with the baseline; both need two seeds at least, and few prove little.",
    "Worst and spread are the least good and the standard deviation of the same figure over the organizations: of the last model"
    " on records like theirs.",
)
TIME = (
    "Time is of a run as it was played: the first ones encode the records too, which later ones find on disk, and runs beside"
    " each other slow each other down."
)
GAIN = (
    "Gain is what joining brings an organization on its own held-out records, against training alone without privacy: the mean"
    " over the organizations, more is better. Beside it stands how many of them, over all seeds, are told that it is worth it,"
    " that it is not, and that it is too close to tell."
)
PRIVATE = "Privacy noise and private sampling are not paired: they come from the operating system and differ in every cell."


def render_comparison(found: Comparison) -> str:
    """Return the page as self-contained HTML."""
    page = page_environment().get_template(_NAME)
    return page.render(
        found=found,
        compared=found.variations[0].key,
        facets=[
            (words(facet), rows, answer(rows, found.baseline, found.measure), _curves(i, rows, found.measure))
            for i, (facet, rows) in enumerate(facets_of(found))
        ],
        few_seeds=few_seeds(found),
        gain=has_gain(found),
        answers_of=answers_of,
        caveats=(*CAVEATS, TIME, *((GAIN,) if has_gain(found) else ()), *((PRIVATE, together(found)) if found.private else ())),
        measure=found.measure,
        measures=get_measures(next((cell.metrics for cell in found.cells if cell.metrics), None)),
        points=lambda value, apart=False: points(value, found.measure, apart=apart),
        verdict=verdict,
        words=words,
    )


def together(found: Comparison) -> str:
    """Return the privacy statement for all runs together."""
    return together_statement(len(found.cells), found.epsilon_together, found.delta_together)


def write_comparison(found: Comparison, path: Path) -> None:
    """Write the page of a comparison."""
    atomic_write(path, render_comparison(found).encode(errors="replace"))


def facets_of(found: Comparison) -> list[tuple[Settings, list[Combination]]]:
    """The rows by facet."""
    return [(facet, list(rows)) for facet, rows in groupby(found.rows, key=lambda row: row.facet)]


def words(settings: Settings) -> str:
    """Return settings as text: "key = value, …"."""
    return ", ".join(f"{key} = {value}" for key, value in settings)


def points(value: Estimate | None, measure: Measure, *, apart: bool = False) -> str:
    """Return an estimate as text: a share in percent, any other figure unchanged; "–" for None.

    Args:
        value: Of a metric.
        measure: The metric.
        apart: Whether the value is a difference, which is shown with a sign; for a share, in percentage points.

    >>> accuracy, loss = get_measures(None)[0], get_measures({"loss": 2.0})[0]
    >>> points(Estimate(0.925, 0.004, 3), accuracy), points(Estimate(-0.01, None, 1), accuracy, apart=True)
    ('92.5 ± 0.4', '−1.0')
    >>> points(Estimate(2.5, 0.004, 3), loss), points(Estimate(-0.01, None, 1), loss, apart=True)
    ('2.500 ± 0.004', '−0.010')
    """
    if value is None:
        return "–"
    factor, digits = (100, 1) if measure.share else (1, 3)
    mean = measure.show_gain(factor * value.mean) if apart else f"{factor * value.mean:.{digits}f}"
    return mean if value.half is None else f"{mean} ± {factor * value.half:.{digits}f}"


def answer(rows: Sequence[Combination], baseline: str, measure: Measure) -> str | None:
    """Return in words which rows of a facet are better than the baseline, worse, or too close to tell.

    The criterion is a corrected p-value below 0.05; a single seed is always too close to tell.

    Args:
        rows: Of the facet.
        baseline: Value of the baseline's row.
        measure: The metric.

    Returns:
        None if there is no row to compare.
    """
    apart = [(row.value, row.difference) for row in rows if row.difference is not None]
    if not apart:
        return None
    decided = [(value, measure.is_better(found.estimate.mean)) for value, found in apart if found.significant]
    better = [value for value, good in decided if good]
    worse = [value for value, good in decided if not good]
    close = [value for value, _ in apart if value not in (*better, *worse)]
    parts = (f"better than {baseline}: {_listed(better)}", f"worse: {_listed(worse)}", f"too close to tell: {_listed(close)}")
    return "; ".join(parts)


def _listed(values: Sequence[str]) -> str:
    return ", ".join(values) or "none"


def few_seeds(found: Comparison) -> str | None:
    """Return advice if there are too few seeds for the test to have power; None if there are enough."""
    seeds = len(found.seeds)
    if seeds >= _ENOUGH_SEEDS:
        return None
    told = "One seed shows no difference from chance" if seeds == 1 else f"{seeds} seeds show only large differences"
    return f"{told}: with --seeds {_ENOUGH_SEEDS} the same command plays the {_ENOUGH_SEEDS - seeds} further ones alone."


def has_gain(found: Comparison) -> bool:
    """Return whether training alone was measured for any run."""
    return any(row.gain is not None for row in found.rows)


def answers_of(row: Combination) -> str:
    """Return the answers in words, such as "2 yes, 1 no, 1 too close"; "–" if there are none."""
    if row.answers is None:
        return "–"
    yes, no, close = row.answers
    return f"{yes} yes, {no} no, {close} too close"


def verdict(row: Combination) -> str:
    """Return the corrected p-value in words, such as "p = 0.012"; "–" if there is none."""
    if row.difference is None or row.difference.holm is None:
        return "–"
    p = row.difference.holm
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _curves(number: int, rows: Sequence[Combination], measure: Measure) -> Chart | None:
    """The mean figure on the test set over the rounds, a line for each row, with its interval; None where nothing was tested."""
    curves = [(row, list(_mean_curve(row.cells))) for row in rows]
    curves = [(row, curve) for row, curve in curves if curve]
    if not curves:
        return None
    rounds = [r for _, curve in curves for r, _ in curve]
    x = Scale(min(rounds) - 0.5, max(rounds) + 0.5)
    factor = 100 if measure.share else 1
    y = value_scale(factor * edge for _, curve in curves for _, value in curve for edge in _edges(value, measure))
    ends = [(row.value, measure.show(curve[-1][1].mean)) for row, curve in curves]
    return Chart(
        name=f"curves-{number}",
        title=f"Test {measure.key} after each round ({measure.number}): mean over the seeds, and its interval",
        description="After the last round: " + ", ".join(f"{name} {end}" for name, end in ends) + ".",
        legend=tuple(Key(_style(i), name, end) for i, (name, end) in enumerate(ends)),
        lines=tuple(_line(i, row.value, curve, x, y, measure) for i, (row, curve) in enumerate(curves)),
        bands=(),
        x_ticks=round_ticks(x),
        y_ticks=value_ticks(y),
    )


def _mean_curve(cells: Sequence[Measured]) -> Iterator[tuple[int, Estimate]]:
    """(round, estimate over the seeds that have it)."""
    found: dict[int, list[float]] = {}
    for cell in cells:
        for round, figure in cell.curve:
            found.setdefault(round, []).append(figure)
    for round in sorted(found):
        value = estimate(found[round])
        assert value is not None
        yield round, value


def _edges(value: Estimate, measure: Measure) -> tuple[float, float]:
    """The interval, within what the figure can be."""
    most = 1.0 if measure.share else math.inf
    return max(0.0, value.mean - (value.half or 0.0)), min(most, value.mean + (value.half or 0.0))


def _line(number: int, name: str, curve: Sequence[tuple[int, Estimate]], x: Scale, y: Scale, measure: Measure) -> Line:
    factor = 100 if measure.share else 1
    along = [(x.along(r), *(y.down(factor * edge) for edge in _edges(value, measure))) for r, value in curve]
    area = [*(Point(at, high, "") for at, _, high in along), *(Point(at, low, "") for at, low, _ in reversed(along))]
    uncertain = any(value.half is not None for _, value in curve)
    dots = tuple(
        Point(x.along(r), y.down(factor * v.mean), f"{name}, round {r}: {points(v, measure)} {measure.number}") for r, v in curve
    )
    return Line(_style(number), dots, len(dots) <= MOST_DOTS, tuple(area) if uncertain else ())


def _style(number: int) -> str:
    """A color and a dash pattern: 36 that differ."""
    return f"c{number % COLORS} pattern{(number + number // COLORS) % COLORS}"
