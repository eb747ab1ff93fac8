"""Compute the report's charts as numbers: positions in percent of the plot, (0, 0) at the top left; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.formatting import percent
from cotune.reporting.measures import Measure, get_measures
from cotune.reporting.verdict import Summary, is_private, is_real

_MOST_DRAWN = 1e12  # largest ε in a chart; older runs accepted any stated value
COLORS = 6  # in the page's palette, which color-blind readers can distinguish
MOST_DOTS = 30  # on one line; more overlap on a phone


@dataclass(frozen=True)
class Scale:
    """A linear map of [low, high] to 0..100 %."""

    low: float
    high: float

    def along(self, value: float) -> float:
        """Map a value to 0..100 % from the low end."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def down(self, value: float) -> float:
        """Map a value to 0..100 % from the high end, as SVG's y axis points down."""
        return round(100 - self.along(value), 3)


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    text: str  # what it stands for, shown under the pointer


@dataclass(frozen=True)
class Line:
    """A curve, or a level to compare it with."""

    style: str  # CSS classes
    points: tuple[Point, ...]
    dots: bool
    area: tuple[Point, ...] = ()  # the outline of what it is uncertain by


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    style: str
    name: str
    value: str


@dataclass(frozen=True)
class Band:
    """The consecutive rounds of one stage."""

    stage: str
    first: int
    last: int
    x: float
    width: float


@dataclass(frozen=True)
class Chart:
    name: str  # unique in the page
    title: str
    description: str  # the chart in words
    legend: tuple[Key, ...]
    lines: tuple[Line, ...]
    bands: tuple[Band, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def accuracy_chart(summary: Summary) -> Chart | None:
    """Return the chart of test accuracy (or loss) over the rounds, with baselines; None if no round was tested."""
    measure = get_measures(next((r["metrics"] for r in summary["rounds"] if r["metrics"] is not None), None))[0]
    measured = {r["round"]: r["metrics"][measure.key] for r in summary["rounds"] if r["metrics"] is not None}
    if not measured:
        return None
    levels = _baselines(summary["test"], measure)
    rounds = _round_scale(summary)
    factor = 100 if measure.share else 1
    y = value_scale(factor * value for value in (*measured.values(), *(value for _, _, value in levels)))
    points = tuple(Point(rounds.along(r), y.down(factor * v), f"Round {r}: {measure.show(v)}") for r, v in measured.items())
    return Chart(
        name="accuracy",
        title=f"{measure.name.capitalize()} on the common test set after each round{' (%)' if measure.share else ''}",
        description=f"{points[0].text}. {points[-1].text}. " + ". ".join(f"{name}: {measure.show(v)}" for _, name, v in levels),
        legend=(
            Key("c0 strong", "federated", measure.show(summary["test"]["federated"][measure.key])),
            *(Key(style, name, measure.show(value)) for style, name, value in levels),
        ),
        lines=(
            *(_level(style, y.down(factor * value)) for style, _, value in levels),
            Line("c0 strong", points, len(points) <= MOST_DOTS),
        ),
        bands=_bands(summary, rounds),
        x_ticks=round_ticks(rounds),
        y_ticks=value_ticks(y),
    )


def epsilon_chart(summary: Summary) -> Chart | None:
    """Return the chart of ε spent by each organization over the rounds, with the allowed ε.

    None without privacy, before any spending, or if a stated ε is too large for a chart.
    """
    rounds = _round_scale(summary)
    spent = [value for r in summary["rounds"] for value in r["epsilon"].values()]
    if not is_private(summary) or not spent or not all(abs(value) <= _MOST_DRAWN for value in spent):
        return None
    allowed = sorted({o["epsilon_allowed"] for o in summary["organizations"] if o["epsilon_allowed"] is not None})
    y = value_scale([0, *spent, *allowed])
    verb = "stated" if is_real(summary) else "spent"
    return Chart(
        name="epsilon",
        title=f"Privacy budget: ε {verb} after each round",
        description=f"The most that any organization {verb} is {round_up(max(spent))}. Allowed: {_listed(allowed)}.",
        legend=(*_epsilon_legend(summary), *([Key("limit", "allowed", _listed(allowed))] if allowed else [])),
        lines=(*(_level("limit", y.down(value)) for value in allowed), *_epsilon_lines(summary, rounds, y)),
        bands=_bands(summary, rounds),
        x_ticks=round_ticks(rounds),
        y_ticks=value_ticks(y),
    )


def _epsilon_lines(summary: Summary, rounds: Scale, y: Scale) -> Iterator[Line]:
    names = [o["name"] for o in summary["organizations"]]
    for style, name in zip(_styles(len(names)), names, strict=True):
        spent = [(r["round"], r["epsilon"][name]) for r in summary["rounds"] if name in r["epsilon"]]
        points = tuple(Point(rounds.along(r), y.down(e), f"{name}, round {r}: ε = {round_up(e)}") for r, e in spent)
        yield Line(style, points, len(names) <= COLORS and len(points) <= MOST_DOTS)


def _epsilon_legend(summary: Summary) -> Iterator[Key]:
    """An entry each while the colors last, else one for all."""
    spent = {o["name"]: o["epsilon_spent"] for o in summary["organizations"] if o["epsilon_spent"] is not None}
    styles = _styles(len(summary["organizations"]))
    if len(styles) > COLORS:
        yield Key(
            styles[0],
            f"each of {len(styles)} organizations",
            f"at most {round_up(max(spent.values()))}" if spent else "",
        )
        return
    for style, each in zip(styles, summary["organizations"], strict=True):
        yield Key(style, each["name"], round_up(spent[each["name"]]) if each["name"] in spent else "")


def _styles(count: int) -> list[str]:
    """A color and a dash pattern each, while they last."""
    return [f"c{i} pattern{i}" for i in range(count)] if count <= COLORS else ["c0 faint"] * count


def _baselines(test: Summary, measure: Measure) -> list[tuple[str, str, float]]:
    """(style, name, figure) of each baseline that was measured."""
    alone = test["alone"] and test["alone"]["mean"]
    without = test["alone_without_privacy"] and test["alone_without_privacy"]["mean"]
    all_of_them = (
        ("c2 pattern1", "all data pooled, no privacy", test["pooled"]),
        ("c1 pattern2", "alone, mean", alone),
        ("c3 pattern4", "alone without privacy, mean", without),
        ("c5 pattern3", measure.floor, test["majority"]),
    )
    return [(style, name, metrics[measure.key]) for style, name, metrics in all_of_them if metrics is not None]


def _level(style: str, y: float) -> Line:
    return Line(style, (Point(0, y, ""), Point(100, y, "")), False)


def _round_scale(summary: Summary) -> Scale:
    """Half a round of space on both sides, so that one round makes a chart too."""
    numbers = [r["round"] for r in summary["rounds"]] or [1]
    return Scale(min(numbers) - 0.5, max(numbers) + 0.5)


def value_scale(values: Iterable[float]) -> Scale:
    """The values' range, widened to whole steps."""
    known = list(values)
    low = min(known)
    high = max(known)
    step = _step(high - low or 1, 5)
    bottom = math.floor(low / step) * step
    return Scale(bottom, max(math.ceil(high / step) * step, bottom + step))


def _step(span: float, most: int) -> float:
    """Return the smallest of 1, 2, 5 × 10^k that divides `span` into at most `most` parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power, 20 * power) if span <= step * most)


def value_ticks(y: Scale) -> tuple[tuple[float, str], ...]:
    """Return (position, text) of the ticks of a value axis."""
    step = _step(y.high - y.low, 6)
    values = (y.low + step * i for i in range(round((y.high - y.low) / step) + 1))
    return tuple((y.down(value), f"{value:g}") for value in values)


def round_ticks(rounds: Scale) -> tuple[tuple[float, str], ...]:
    """Return (position, text) of the ticks of the axis of rounds."""
    first = math.ceil(rounds.low)
    last = math.floor(rounds.high)
    step = max(1, round(_step(max(last - first, 1), 8)))
    return tuple((rounds.along(r), str(r)) for r in range(first, last + 1) if r % step == 0)


def _bands(summary: Summary, rounds: Scale) -> tuple[Band, ...]:
    """The stages of a staged run, in order; nothing if there was only one."""
    found = []
    for stage, group in groupby(summary["rounds"], key=lambda r: r["stage"]):
        numbers = [r["round"] for r in group]
        left = rounds.along(numbers[0] - 0.5)
        right = rounds.along(numbers[-1] + 0.5)
        found.append(Band(stage, numbers[0], numbers[-1], left, round(right - left, 3)))
    return tuple(found) if len(found) > 1 else ()


@dataclass(frozen=True)
class Part:
    """A label's part of an organization's examples."""

    style: str
    x: float  # where it starts, %
    width: float  # %
    text: str


def label_keys(summary: Summary) -> tuple[Key, ...]:
    """Return the labels with their own colors: all, or the most frequent ones and one entry for the others."""
    labels = summary["labels"]
    if len(labels) <= COLORS:
        return tuple(Key(f"c{i}", label, "") for i, label in enumerate(labels))
    total = {label: sum(o["labels"].get(label, 0) for o in summary["organizations"]) for label in labels}
    frequent = sorted(labels, key=lambda label: -total[label])[: COLORS - 1]
    own = (Key(f"c{i}", label, "") for i, label in enumerate(label for label in labels if label in frequent))
    return (*own, Key(f"c{COLORS - 1}", f"{len(labels) - len(frequent)} others", ""))


def label_bar(summary: Summary, counts: Mapping[str, int]) -> tuple[Part, ...]:
    """The stacked bar of one organization, in the order of `label_keys`; empty if it has no labeled example."""
    keys = label_keys(summary)
    total = sum(counts.values())
    own = [counts.get(key.name, 0) for key in keys]
    if len(summary["labels"]) > COLORS:
        own[-1] = total - sum(own[:-1])
    parts = []
    start = 0
    for key, count in zip(keys, own, strict=True) if total else ():
        text = f"{key.name}: {count:,} ({percent(count / total)})"
        parts.append(Part(key.style, round(100 * start / total, 3), round(100 * count / total, 3), text))
        start += count
    return tuple(parts)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(round_up(value) for value in values)
