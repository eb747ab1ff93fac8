"""What files and strangers say, fit for a terminal and a log: it shows every character, and none is obeyed.

Two places make it so. `Clean` stands before a process's standard output and error, no matter who writes there; lines of a command
are made printable before they are laid out (`cli/console.py`), and reach the terminal past it, as only they may move the cursor.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import unicodedata

if __name__ != "cotune.printable":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.printable`")

IGNORABLE = frozenset(
    chr(code)
    for first, last in ((0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x3164, 0x3164), (0xFE00, 0xFE0F))
    for code in range(first, last + 1)
) | frozenset(map(chr, (0xFFA0, *range(0xE0000, 0xE1000))))  # Unicode's Default_Ignorable_Code_Point beyond the category Cf
_STYLE = re.compile(r"\x1b\[(?:(?:[0-47]|2[2-47]|3[1-79]|9[1-7])(?:;(?!m)|(?=m)))*m")  # weight and color; nothing that conceals


def printable(text: str) -> str:
    r"""One line in which every character that a terminal would obey, or would not show, is written out as in JSON.

    >>> print(printable("good\x1b[2K\rbad" + chr(0x202E)))
    good\u001b[2K\rbad\u202e
    """
    return text if _is_plain(text) else "".join(char if _is_plain(char) else _written_out(char) for char in text)


def lines_of(text: str) -> str:
    """The same for a text of several lines, with its tabs; a return without a line feed begins a new line and hides none."""
    rest = text.replace("\n", "").replace("\t", "")
    if _is_plain(rest):
        return text
    parts = re.split(r"([\n\t])", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "".join(part if part in ("\n", "\t") else printable(part) for part in parts)


def _is_plain(text: str) -> bool:
    """Printable by Python's rule, other spaces than the ordinary one among it, and visible."""
    if not text.isprintable() and any(unicodedata.category(char) != "Zs" for char in text if not char.isprintable()):
        return False
    return text.isascii() or IGNORABLE.isdisjoint(text)


def _written_out(char: str) -> str:
    r"""As \n, \u001b or \udb40\udc01: within a JSON text it still means the same."""
    return json.dumps(char)[1:-1]


class Clean(io.TextIOWrapper):
    """A process's standard output or error without control characters; styles are kept only on a terminal.

    Args:
        inner: The underlying stream, for text that is clean already. Both streams write through, so that lines keep their order.
    """

    def __init__(self, inner: io.TextIOWrapper) -> None:
        inner.reconfigure(errors="replace", write_through=True)  # what is not UTF-8 shows ? for what it cannot show
        super().__init__(inner.buffer, inner.encoding, errors="replace", line_buffering=inner.line_buffering, write_through=True)
        self.inner = inner

    def close(self) -> None:
        """Flush, and leave the underlying stream open, as it belongs to the process."""
        self.flush()

    def write(self, text: str, /) -> int:
        """Write a text without control characters, and return its length."""
        style = self.isatty()
        found = [lines_of(text[start:end]) + (text[end:stop] if style else "") for start, end, stop in _cut(text)]
        super().write("".join(found))
        return len(text)


def _cut(text: str) -> list[tuple[int, int, int]]:
    """Return (start, end, end of the following style) of each piece of text between styles."""
    styles = [match.span() for match in _STYLE.finditer(text)]
    starts = [0, *(end for _, end in styles)]
    return [(start, *span) for start, span in zip(starts, [*styles, (len(text), len(text))], strict=True)]


def clean_output() -> None:
    """From now on nothing in this process writes to its output otherwise. Called again, it changes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Clean):
            clean = Clean(stream)
            setattr(sys, name, clean)
            _hand_over(stream, clean)


def _hand_over(before: io.TextIOWrapper, after: Clean) -> None:
    """Logs keep the stream that was there when they were set up, but for those that look for it each time."""
    named = logging.Logger.manager.loggerDict.values()
    loggers = [logging.getLogger(), *(each for each in named if isinstance(each, logging.Logger))]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") is before:
            handler.setStream(after)
