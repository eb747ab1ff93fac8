"""Numbers as people read them, in the report and on the command line."""

from __future__ import annotations

import math
from datetime import UTC, datetime

SPACE = "\u00a0"  # keeps a number and its unit on one line


def percent(share: float) -> str:
    """
    >>> percent(0.734).replace(SPACE, " ")
    '73.4 %'
    """
    return f"{100 * _shown(share):.1f}{SPACE}%"


def signed(points: float) -> str:
    """
    >>> signed(6.24), signed(-1.1), signed(-0.01)
    ('+6.2', '−1.1', '0.0')
    """
    rounded = round(_shown(points), 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def scientific(value: float) -> str:
    """
    >>> scientific(4.4e-05).replace(SPACE, " "), scientific(0.01)
    ('4.4 × 10⁻⁵', '0.01')
    """
    value = _shown(value)
    if not 0 < abs(value) < 0.001:
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}{SPACE}×{SPACE}10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def size(count: float) -> str:
    """
    >>> size(12345).replace(SPACE, " "), size(999)
    ('12.3 kB', '999\\xa0B')
    """
    count = _shown(count)
    if not math.isfinite(count):
        return f"{count}{SPACE}B"
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log10(max(count, 1)) // 3), len(units) - 1)
    return f"{count / 1000**power:.{1 if power else 0}f}{SPACE}{units[power]}"


def duration(seconds: float) -> str:
    """
    >>> [duration(s).replace(SPACE, " ") for s in (1.2, 100, 7500)]
    ['1.2 s', '1 min 40 s', '2 h 5 min']
    """
    seconds = _shown(seconds)
    if seconds < 60 or not math.isfinite(seconds):
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


def _shown(value: float) -> float:
    """Whatever a member has stated or a file holds can be shown: an integer may be larger than any float."""
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value > 0 or -1)
