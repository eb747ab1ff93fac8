"""The templates of pages and files that cotune writes: HTML that escapes everything, and plain text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.formatting import duration, instant, percent, scientific, signed, size

_TEMPLATES = Path(__file__).parent / "templates"


def render_text(template: str, /, **values: object) -> str:
    """Return a text file such as `join.md.j2`, filled in. A field that is not given is an error."""
    return _text_environment().get_template(template).render(values)


@cache
def _text_environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def _or_dash(write: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "–" if value is None else write(value)


@cache
def page_environment() -> Environment:
    """Return the environment of HTML pages, which compiles each template once: it escapes everything, and refuses a field that is
    not there."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    numbers = (percent, signed, round_up, scientific, size, duration)
    environment.filters.update({write.__name__: _or_dash(write) for write in numbers}, instant=instant, whole="{:,}".format)
    return environment
