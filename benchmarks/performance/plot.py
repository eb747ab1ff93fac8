"""Draw curves as SVG, on logarithmic axes: a column of plots for each thing that grows, a row for each figure.

Dots are what was measured, and the dashed line is c · size^k through all of them; k is written beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from harness import Curve

_WIDTH = 300  # of a plot with its labels
_HEIGHT = 230
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 30, 20, 38  # room around the axes
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_COLORS = ("#1f6fb2", "#c7581a", "#3a8c4a")


@dataclass(frozen=True)
class Axis:
    """Logarithms of whole powers of ten that hold the values, mapped to pixels."""

    low: int
    high: int
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value is."""
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def powers(self) -> Iterator[tuple[float, str]]:
        """Position and text of every power of ten."""
        for power in range(self.low, self.high + 1):
            yield self.at(10.0**power), _name_power(power)


def draw(curves: Sequence[Curve]) -> str:
    """Return the picture.

    Args:
        curves: Each with at least one point.
    """
    columns = list(dict.fromkeys(curve.against for curve in curves))
    rows = list(dict.fromkeys(curve.what for curve in curves))
    width, height = _WIDTH * len(columns), _HEIGHT * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, what in enumerate(rows):
        for column, against in enumerate(columns):
            chosen = [curve for curve in curves if (curve.what, curve.against) == (what, against)]
            if chosen:
                parts += _draw_plot(chosen, column * _WIDTH, row * _HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


def _draw_plot(curves: Sequence[Curve], left: float, top: float) -> Iterator[str]:
    x = _axis([size for curve in curves for size, _ in curve.points], left + _LEFT, left + _WIDTH - _RIGHT)
    y = _axis([figure for curve in curves for _, figure in (*curve.points, *_ends(curve))], top + _HEIGHT - _BOTTOM, top + _TOP)
    first = curves[0]
    yield _text(
        (x.start + x.end) / 2, top + 16, f"{first.what} of a run ({first.unit}) against {first.against}", "middle", "#222"
    )
    for at, name in x.powers():
        yield _line(at, y.start, at, y.end, "#ddd") + _text(at, y.start + 15, name, "middle")
    for at, name in y.powers():
        yield _line(x.start, at, x.end, at, "#ddd") + _text(x.start - 5, at + 4, name, "end")
    for number, curve in enumerate(curves):
        yield from _draw_curve(curve, x, y, _COLORS[number % len(_COLORS)], number)


def _draw_curve(curve: Curve, x: Axis, y: Axis, color: str, number: int) -> Iterator[str]:
    name = curve.series
    if ends := _ends(curve):
        (x1, y1), (x2, y2) = ((x.at(size), y.at(figure)) for size, figure in ends)
        yield _line(x1, y1, x2, y2, color, ' stroke-dasharray="4 3"')
        name += f"{': ' if name else ''}slope {curve.slope:.2f}, last step {curve.last_slope:.2f}"
    for size, figure in curve.points:
        about = f"<title>{size:,.0f} {escape(curve.against)}: {figure:.3g} {escape(curve.unit)}</title>"
        yield f'<circle cx="{x.at(size):.1f}" cy="{y.at(figure):.1f}" r="3.5" fill="{color}">{about}</circle>'
    yield _text(x.start + 6, y.end + 13 + 14 * number, name, "start", color)


def _ends(curve: Curve) -> list[tuple[float, float]]:
    """Those of the line through all points; one point has none."""
    if len(curve.points) < 2:
        return []
    slope, factor = curve.line
    return [(size, factor * size**slope) for size in (curve.points[0][0], curve.points[-1][0])]


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    low = math.floor(math.log10(min(values)))
    high = math.ceil(math.log10(max(values)))
    return Axis(low, max(high, low + 1), start, end)


def _line(x1: float, y1: float, x2: float, y2: float, color: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{more}/>'


def _text(x: float, y: float, text: str, anchor: str, color: str = "#555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _name_power(power: int) -> str:
    """0.1, 1,000, 10⁸."""
    return f"{10.0**power:,g}" if -3 <= power <= 4 else "10" + str(power).translate(_RAISED)
