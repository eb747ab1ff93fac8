"""The report of a run: one HTML page that answers, for a manager and for an engineer, "is it worth joining?".

The page is made from the run's `summary.json` alone. It loads nothing (its content security policy forbids it), runs no script, and follows
the reader's light or dark setting. Names and labels come from other organisations, so everything is escaped. Charts are SVG whose places
are percentages: they stretch with the page while their text keeps its size, on a phone as on a desk.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["render_report", "write_report"]

Summary = Mapping[str, Any]
COLOURS = 6  # in the page's palette, which colour-blind readers can tell apart
SPACE = "\u00a0"  # keeps a number and its unit on one line


def render_report(summary: Summary) -> str:
    """The page for one `summary.json` (schema 1), complete and self-contained.

    What was not measured is None there and is left out here, with a note. Raises KeyError or jinja2.UndefinedError where a field is absent.
    """
    page = _environment().get_template("report.html.j2")
    return page.render(
        summary=summary,
        private=is_private(summary),
        verdict=judge(summary),
        results=results(summary),
        accuracy_chart=accuracy_chart(summary),
        epsilon_chart=epsilon_chart(summary),
        label_keys=label_keys(summary),
        label_bar=lambda organisation: label_bar(summary, organisation["labels"]),
        dropped=[(r["round"], each) for r in summary["rounds"] for each in r["dropped"]],
    )


def write_report(summary: Summary, path: Path) -> None:
    """Write the page to `path` in one step: a reader finds the old page or the new one, never half of one."""
    page = render_report(summary)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # "replace": a name may hold half a surrogate pair, which JSON allows and UTF-8 does not
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_private(summary: Summary) -> bool:
    return bool(summary["privacy"]["mode"] != "none")


# --- the verdict and the table of results


@dataclass(frozen=True)
class Verdict:
    """The answer in a word, the sentence with its numbers, and what a careful reader should know beside it."""

    answer: str  # "Yes", "No", or "Measured" where there is nothing to compare with
    sentence: str
    notes: tuple[str, ...]


def judge(summary: Summary) -> Verdict:
    """Yes if the federated model beats the organisations alone (their mean), and the majority class, by at least 0.1 points."""
    test, gain = summary["test"], _gain(summary["test"])
    useful = _points(test["federated"], test["majority"]) > 0
    answer = "Measured" if gain is None else "Yes" if gain > 0 and useful else "No"
    return Verdict(answer, _sentence(test, useful), (*_gains_note(summary), _chance_note(test)))


def _sentence(test: Summary, useful: bool) -> str:
    federated, gain = test["federated"], _gain(test)
    against = []
    if gain is not None:
        against.append(_against(gain, "the mean of the organisations alone"))
    if gain is None or not useful:
        against.append(_against(_points(federated, test["majority"]), "always giving the most frequent label"))
    if test["pooled"] is not None:
        against.append(_against_pooled(_points(federated, test["pooled"]), gain))
    unknown = "" if gain is not None else "; what the organisations reach alone was not measured"
    return f"the federated model reaches {percent(federated['accuracy'])} accuracy, {', and '.join(against)}{unknown}."


def _against(points: float, name: str) -> str:
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} {name}" if points else f"level with {name}"


def _against_pooled(points: float, gain: float | None) -> str:
    """ "within" only where the run closed at least half of the way from alone to pooled."""
    name = "pooling all data without privacy"
    if gain is not None and 0 < -points <= gain:
        return f"within {-points:.1f} points of {name}"
    return _against(points, name)


def _gains_note(summary: Summary) -> Iterator[str]:
    gains = [round(100 * o["gain"], 1) for o in summary["organisations"] if o["gain"] is not None]
    if gains:
        better = sum(gain > 0 for gain in gains)
        who = f"All {len(gains)}" if better == len(gains) else f"{better} of {len(gains)}"
        yield f"{who} organisations gain over training alone: from {signed(min(gains))} to {signed(max(gains))} points."


def _chance_note(test: Summary) -> str:
    """The 95 % interval of an accuracy on this many examples (normal approximation), and a warning where the gain is inside it."""
    accuracy, gain = test["federated"]["accuracy"], _gain(test)
    margin = 100 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / test["examples"])
    note = f"Measured on {test['examples']:,} test examples, where chance moves an accuracy by about ±{margin:.1f} points."
    tie = " The gain over the organisations alone is smaller than that: treat it as a tie until it is measured again."
    return note + tie if gain is not None and 0 < gain < margin else note


def _gain(test: Summary) -> float | None:
    """Points of accuracy over the mean of the organisations alone, None where that was not measured."""
    return None if test["alone"] is None else _points(test["federated"], test["alone"]["mean"])


def _points(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """Percentage points between two accuracies, to the one decimal that is shown: the words never contradict the numbers."""
    return round(100 * (ours["accuracy"] - theirs["accuracy"]), 1)


def results(summary: Summary) -> dict[str, Mapping[str, float] | None]:
    """The rows of the table of results, from floor to bound."""
    test = summary["test"]
    same = ", same privacy" if is_private(summary) else ""
    return {
        "Majority class": test["majority"],
        f"Each organisation alone (mean{same})": test["alone"] and test["alone"]["mean"],
        "Federated (this run)": test["federated"],
        "All data pooled, without privacy (the bound)": test["pooled"],
    }


# --- charts: places are percentages of the plot, (0, 0) at its top left


@dataclass(frozen=True)
class Scale:
    """A linear map of [low, high] to 0..100 %."""

    low: float
    high: float

    def along(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def down(self, value: float) -> float:
        """As `along`, from the top, as SVG counts."""
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
    """Test accuracy after each round against what is reached without it; None if no round was tested."""
    measured = {r["round"]: r["metrics"]["accuracy"] for r in summary["rounds"] if r["metrics"] is not None}
    if not measured:
        return None
    levels, rounds = _baselines(summary["test"]), _round_scale(summary)
    y = _value_scale(100 * value for value in (*measured.values(), *(value for _, _, value in levels)))
    points = tuple(Point(rounds.along(r), y.down(100 * v), f"Round {r}: {percent(v)}") for r, v in measured.items())
    return Chart(
        name="accuracy",
        title="Test accuracy after each round (%)",
        description=f"{points[0].text}. {points[-1].text}. " + ". ".join(f"{name}: {percent(v)}" for _, name, v in levels),
        legend=(
            Key("c0 strong", "federated", percent(summary["test"]["federated"]["accuracy"])),
            *(Key(style, name, percent(value)) for style, name, value in levels),
        ),
        lines=(*(_level(style, y.down(100 * value)) for style, _, value in levels), Line("c0 strong", points, True)),
        bands=_bands(summary, rounds),
        x_ticks=_round_ticks(rounds),
        y_ticks=_value_ticks(y),
    )


def epsilon_chart(summary: Summary) -> Chart | None:
    """ε spent by each organisation after each round, and what it allows; None without privacy or before anything was spent."""
    rounds = _round_scale(summary)
    spent = [value for r in summary["rounds"] for value in r["epsilon"].values()]
    if not is_private(summary) or not spent:
        return None
    allowed = sorted({o["epsilon_allowed"] for o in summary["organisations"] if o["epsilon_allowed"] is not None})
    y = _value_scale([0, *spent, *allowed])
    return Chart(
        name="epsilon",
        title="Privacy budget: ε spent after each round",
        description=f"The most that any organisation spent is {epsilon(max(spent))}. Allowed: {_listed(allowed)}.",
        legend=(*_epsilon_legend(summary), *([Key("limit", "allowed", _listed(allowed))] if allowed else [])),
        lines=(*(_level("limit", y.down(value)) for value in allowed), *_epsilon_lines(summary, rounds, y)),
        bands=_bands(summary, rounds),
        x_ticks=_round_ticks(rounds),
        y_ticks=_value_ticks(y),
    )


def _epsilon_lines(summary: Summary, rounds: Scale, y: Scale) -> Iterator[Line]:
    names = [o["name"] for o in summary["organisations"]]
    for style, name in zip(_styles(len(names)), names, strict=True):
        spent = [(r["round"], r["epsilon"][name]) for r in summary["rounds"] if name in r["epsilon"]]
        points = (Point(rounds.along(r), y.down(e), f"{name}, round {r}: ε = {epsilon(e)}") for r, e in spent)
        yield Line(style, tuple(points), len(names) <= COLOURS)


def _epsilon_legend(summary: Summary) -> Iterator[Key]:
    """An entry each while the colours last, else one for all."""
    spent = {o["name"]: o["epsilon_spent"] for o in summary["organisations"] if o["epsilon_spent"] is not None}
    styles = _styles(len(summary["organisations"]))
    if len(styles) > COLOURS:
        yield Key(
            styles[0],
            f"each of {len(styles)} organisations",
            f"at most {epsilon(max(spent.values()))}" if spent else "",
        )
        return
    for style, each in zip(styles, summary["organisations"], strict=True):
        yield Key(style, each["name"], epsilon(spent[each["name"]]) if each["name"] in spent else "")


def _styles(count: int) -> list[str]:
    """A colour and a dash pattern each, while they last."""
    return [f"c{i} pattern{i}" for i in range(count)] if count <= COLOURS else ["c0 faint"] * count


def _baselines(test: Summary) -> list[tuple[str, str, float]]:
    """(style, name, accuracy) of each baseline that was measured."""
    alone = test["alone"] and test["alone"]["mean"]
    all_three = (
        ("c2 pattern1", "all data pooled, no privacy", test["pooled"]),
        ("c1 pattern2", "alone, mean", alone),
        ("c5 pattern3", "majority class", test["majority"]),
    )
    return [(style, name, metrics["accuracy"]) for style, name, metrics in all_three if metrics is not None]


def _level(style: str, y: float) -> Line:
    return Line(style, (Point(0, y, ""), Point(100, y, "")), False)


def _round_scale(summary: Summary) -> Scale:
    """Half a round of space on both sides, so that one round makes a chart too."""
    numbers = [r["round"] for r in summary["rounds"]] or [1]
    return Scale(min(numbers) - 0.5, max(numbers) + 0.5)


def _value_scale(values: Iterable[float]) -> Scale:
    """The values' range, widened to whole steps."""
    known = list(values)
    low, high = min(known), max(known)
    step = _step(high - low or 1, 5)
    bottom = math.floor(low / step) * step
    return Scale(bottom, max(math.ceil(high / step) * step, bottom + step))


def _step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 × 10^k that cuts `span` into at most `most` parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power, 20 * power) if span <= step * most)


def _value_ticks(y: Scale) -> tuple[tuple[float, str], ...]:
    step = _step(y.high - y.low, 6)
    values = (y.low + step * i for i in range(round((y.high - y.low) / step) + 1))
    return tuple((y.down(value), f"{value:g}") for value in values)


def _round_ticks(rounds: Scale) -> tuple[tuple[float, str], ...]:
    first, last = math.ceil(rounds.low), math.floor(rounds.high)
    step = max(1, round(_step(max(last - first, 1), 8)))
    return tuple((rounds.along(r), str(r)) for r in range(first, last + 1) if r % step == 0)


def _bands(summary: Summary, rounds: Scale) -> tuple[Band, ...]:
    """The stages of a staged run, in order; nothing if there was only one."""
    found = []
    for stage, group in groupby(summary["rounds"], key=lambda r: r["stage"]):
        numbers = [r["round"] for r in group]
        left, right = rounds.along(numbers[0] - 0.5), rounds.along(numbers[-1] + 0.5)
        found.append(Band(stage, numbers[0], numbers[-1], left, round(right - left, 3)))
    return tuple(found) if len(found) > 1 else ()


# --- labels


@dataclass(frozen=True)
class Part:
    """A label's part of an organisation's examples."""

    style: str
    x: float  # where it starts, %
    width: float  # %
    text: str


def label_keys(summary: Summary) -> tuple[Key, ...]:
    """The labels that get a colour of their own: all, or the most frequent ones and one entry for the others."""
    labels = summary["labels"]
    if len(labels) <= COLOURS:
        return tuple(Key(f"c{i}", label, "") for i, label in enumerate(labels))
    total = {label: sum(o["labels"].get(label, 0) for o in summary["organisations"]) for label in labels}
    frequent = sorted(labels, key=lambda label: -total[label])[: COLOURS - 1]
    own = (Key(f"c{i}", label, "") for i, label in enumerate(label for label in labels if label in frequent))
    return (*own, Key(f"c{COLOURS - 1}", f"{len(labels) - len(frequent)} others", ""))


def label_bar(summary: Summary, counts: Mapping[str, int]) -> tuple[Part, ...]:
    """The stacked bar of one organisation, in the order of `label_keys`; empty if it has no labelled example."""
    keys, total = label_keys(summary), sum(counts.values())
    own = [counts.get(key.name, 0) for key in keys]
    if len(summary["labels"]) > COLOURS:
        own[-1] = total - sum(own[:-1])
    parts, start = [], 0
    for key, count in zip(keys, own, strict=True) if total else ():
        text = f"{key.name}: {count:,} ({percent(count / total)})"
        parts.append(Part(key.style, round(100 * start / total, 3), round(100 * count / total, 3), text))
        start += count
    return tuple(parts)


# --- how numbers are written


def percent(share: float) -> str:
    """
    >>> percent(0.734).replace(SPACE, " ")
    '73.4 %'
    """
    return f"{100 * share:.1f}{SPACE}%"


def signed(points: float) -> str:
    """
    >>> signed(6.24), signed(-1.1), signed(-0.01)
    ('+6.2', '−1.1', '0.0')
    """
    rounded = round(points, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def epsilon(value: float) -> str:
    """To two decimals, rounded up: what was spent is never shown smaller than it is.

    >>> epsilon(7.98), epsilon(7.981), epsilon(8)
    ('7.98', '7.99', '8.00')
    """
    return str(Decimal(str(value)).quantize(Decimal("0.01"), ROUND_CEILING))


def scientific(value: float) -> str:
    """
    >>> scientific(4.4e-05).replace(SPACE, " "), scientific(0.01)
    ('4.4 × 10⁻⁵', '0.01')
    """
    if not 0 < abs(value) < 0.001:
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}{SPACE}×{SPACE}10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def size(count: float) -> str:
    """
    >>> size(12345).replace(SPACE, " "), size(999)
    ('12.3 kB', '999\\xa0B')
    """
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log10(max(count, 1)) // 3), len(units) - 1)
    return f"{count / 1000**power:.{1 if power else 0}f}{SPACE}{units[power]}"


def duration(seconds: float) -> str:
    """
    >>> [duration(s).replace(SPACE, " ") for s in (1.2, 100, 7500)]
    ['1.2 s', '1 min 40 s', '2 h 5 min']
    """
    if seconds < 60:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s").replace(" ", SPACE)


def instant(iso: str) -> str:
    """
    >>> instant("2026-11-22T11:15:00+01:00")
    '2026-11-22 10:15 UTC'
    """
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(epsilon(value) for value in values)


def _or_dash(write: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "–" if value is None else write(value)


def _environment() -> Environment:
    """Escapes everything, and refuses a field that is not there."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    numbers = (percent, signed, epsilon, scientific, size, duration)
    environment.filters.update({write.__name__: _or_dash(write) for write in numbers}, instant=instant, whole="{:,}".format)
    return environment
