"""The console of all commands: lines are not wrapped, and tables are fitted to the width only on a terminal.

A line may contain untrusted text. Control characters, line breaks included, are escaped before the line is laid out; of rich's
markup, only the styles that commands use are interpreted, but no links and no emoji.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import IO, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.errors import MarkupError
from rich.segment import Segment
from rich.text import Text

from cotune.printable import Clean, lines_of, printable

_ANY_WIDTH = 10_000  # columns
_TAG = re.compile(r"(\\*)\[([a-z#/@][^[]*?)]")  # as rich.markup finds them
_OWN = frozenset({"bold", "bold red", "bold yellow", "dim", "green", "italic", "red", "yellow"})


class SafeConsole(Console):
    """A console that interprets only the markup of commands, not of untrusted text."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False, width: int | None = None) -> None:
        super().__init__(
            file=_past_the_filter(sys.stderr if stderr else sys.stdout),
            stderr=stderr,
            quiet=quiet,
            width=width,
            highlight=False,
            soft_wrap=True,
            emoji=False,
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text that is printed or is in a table comes by here, before anything is measured."""
        shown = printable(text)
        try:
            return super().render_str(_TAG.sub(_own_or_escaped, shown), **options)
        except MarkupError:  # a stranger has ended a style that was not begun
            return super().render_str(shown, **{**options, "markup": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The last look at what was not given as a text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else _clean(segment)


def open_console(*, stderr: bool = False, quiet: bool = False) -> SafeConsole:
    """Return a console as wide as the terminal; elsewhere it breaks no line, so that logs can be searched.

    Args:
        stderr: Whether it prints to standard error, where everything but a command's result belongs.
        quiet: Whether it prints nothing.
    """
    found = SafeConsole(stderr=stderr, quiet=quiet)
    return found if found.file.isatty() else SafeConsole(stderr=stderr, quiet=quiet, width=_ANY_WIDTH)


def announce(what: str, *, quiet: bool = False) -> None:
    """Print an early message to standard error, if that is a terminal, as importing PyTorch takes seconds.

    Args:
        what: What the command does, in one line.
        quiet: Whether to print nothing, as a program reads the output.
    """
    console = SafeConsole(stderr=True, quiet=quiet)
    if console.is_terminal:
        console.print(what, style="dim", markup=False)


def print_json(value: object) -> None:
    """Print the result of a command for programs: indented JSON, and nothing else on standard output."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _past_the_filter(stream: object) -> IO[str] | None:
    """None: whatever the standard stream is when something is printed."""
    return stream.inner if isinstance(stream, Clean) else None


def _own_or_escaped(tag: re.Match[str]) -> str:
    escaped_already = len(tag[1]) % 2 == 1
    return tag[0] if escaped_already or tag[2].removeprefix("/") in _OWN else f"{tag[1] * 2}\\[{tag[2]}]"


def _clean(segment: Segment) -> Segment:
    style = segment.style
    if style is not None and style.link:
        style = style.update_link(None)
    return Segment(lines_of(segment.text), style)
