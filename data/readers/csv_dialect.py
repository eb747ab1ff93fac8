"""CSV files as they are written in practice: which separator, and quotes that open a field and never close it.

Both are decided so that a record has no say in how another one is read: the separator by the line of column names alone, and a
stray quote by the line that it stands in.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence

from cotune.data.class_names import class_name

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_BLANKS = re.compile(" *")
_LINE_END = re.compile(r"\r\n|\r|\n")


def read_separator_line(text: str) -> tuple[str | None, str]:
    """Return the separator that a first line `sep=;` of Excel names, or None, and the text below that line."""
    found = re.match(r'"?sep=([,;|\t])"?[ \t]*(?:\r\n|\r|\n)', text, re.IGNORECASE)
    return (found[1], text[found.end() :]) if found else (None, text)


def guess_separator(text: str, wanted: Sequence[str], usual: str) -> str:
    """Return the separator under which the first line holds most of the wanted columns, and then most columns at all.

    Args:
        text: The file, which begins with a line of column names.
        wanted: The columns that are looked for.
        usual: The separator that the file's suffix means, which is taken where another is no better.
    """
    line = next((line for line in _lines(text) if line.strip()), "")

    def evidence(separator: str) -> tuple[int, int, bool]:
        names = [name.strip() for name in _fields(line, separator)]
        return len(set(wanted) & set(names)), len(names), separator == usual

    return max(SEPARATORS, key=evidence)


def escape_stray_quotes(text: str, separator: str, width: int, column: int, known: Collection[str] | None) -> str:
    """Return the text with the quotes that open a field by mistake written as characters of it.

    A quote is a mistake where its field would run on over a line end, although the line by itself is a whole record: as many
    fields as there are columns, with a known class in the column of labels (where that is before the quote, the next line too).

    Args:
        text: The file, with its line of column names.
        separator: The character between two fields.
        width: How many columns there are.
        column: The position of the labels.
        known: The classes; None: those of the file's lines outside of any field that runs over several lines.
    """
    if '"' not in text:
        return text
    quoted = _quoted_field(separator)
    pieces: list[str] = []
    classes: Collection[str] | None = known
    done = position = 0
    while (found := quoted.search(text, position)) is not None:
        position = max(found.end(), found.start() + 1)
        opening = found.start(1)
        if found[2] and not _LINE_END.search(found[1]):
            continue
        if classes is None:
            classes = _classes_outside(text, quoted, separator, width, column)
        end = _stray_end(text, opening, separator, width, column, classes)
        if end is None:
            continue
        literal = text[opening:end].replace('"', '""')
        pieces += [text[done:opening], f'"{literal}"']
        done = position = end
    return "".join([*pieces, text[done:]]) if pieces else text


def find_unclosed_quote(text: str, separator: str) -> tuple[int, int] | None:
    """Return where the line begins that has a quote which opens a field and is never closed, and the line's number."""
    for found in _quoted_field(separator).finditer(text):
        if not found[2]:
            opening = found.start(1)
            return _line_start(text, opening), 1 + sum(1 for _ in _LINE_END.finditer(text, 0, opening))
    return None


def find_torn_field(text: str, separator: str) -> tuple[int, int] | None:
    """Return (first line, last line) of the first field in quotes over several lines that goes on behind its last quote.

    No program writes such a field: a stray quote opened it, and the records up to the next quote are in it.
    """
    ends = ("", "\r", "\n", separator)
    for found in _quoted_field(separator).finditer(text):
        if not (found[2] and _LINE_END.search(found[1])):
            continue
        behind = _BLANKS.match(text, found.end())
        if behind and text[behind.end() : behind.end() + 1] not in ends:
            first, last = (1 + sum(1 for _ in _LINE_END.finditer(text, 0, end)) for end in (found.start(1), found.end(1)))
            return first, last
    return None


def find_surplus_fields(text: str, separator: str, width: int) -> tuple[int, int] | None:
    """Return (line, number of fields) of the first record of more fields, blank ones aside, than there are columns."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in reader:
            if any(field.strip() for field in row[width:]):
                return reader.line_num, len(row)
    except csv.Error:  # a field longer than the csv module takes
        pass
    return None


def _quoted_field(separator: str) -> re.Pattern[str]:
    """A field in quotes as pandas reads it: (what stands before its last quote, that quote, which may lack at the end)."""
    blanks = "[ \\t]*" if separator != "\t" else " *"  # before the first field of a line
    return re.compile(rf'(?:(?:\A|[\r\n]){blanks}|{re.escape(separator)})("[^"]*(?:""[^"]*)*)("?)')


def _line_start(text: str, position: int) -> int:
    return 1 + max(text.rfind("\n", 0, position), text.rfind("\r", 0, position))


def _stray_end(text: str, opening: int, separator: str, width: int, column: int, classes: Collection[str]) -> int | None:
    """Where the field of a stray quote ends; None where the quote is none, as its line is no record by itself.

    Where the label stands before the quote, it tells nothing about the line's end: then the next line is one by itself, too.
    """
    line_end = _LINE_END.search(text, opening)
    rest = text[opening : line_end.start() if line_end else len(text)].split(separator)
    start = _line_start(text, opening)
    before = _fields(text[start:opening], separator)[:-1] if text[start:opening].strip(" ") else []
    if not _is_record([*before, *rest], width, column, classes):
        return None
    following = _next_line(text, line_end)
    if column < len(before) and following and not _is_record(following.split(separator), width, column, classes):
        return None
    return opening + len(rest[0])


def _is_record(fields: list[str], width: int, column: int, classes: Collection[str]) -> bool:
    """Whether the fields of a line are as many as there are columns, with a known class among them."""
    if len(fields) == width + 1 and not fields[-1].strip():
        fields = fields[:-1]
    return len(fields) == width and _is_class(fields[column].strip().strip('"'), classes)


def _next_line(text: str, end: re.Match[str] | None) -> str:
    """The next line that is not blank; "" at the end."""
    while end is not None:
        following = _LINE_END.search(text, end.end())
        line = text[end.end() : following.start() if following else len(text)]
        if line.strip():
            return line
        end = following
    return ""


def _is_class(label: str, classes: Collection[str]) -> bool:
    """Whether a label is known, or every tag of it."""
    return class_name(label) in classes or (bool(label.split()) and all(class_name(tag) in classes for tag in label.split()))


def _classes_outside(text: str, quoted: re.Pattern[str], separator: str, width: int, column: int) -> set[str]:
    """The labels of lines without a quote that no properly closed field runs over."""
    proper = ("", "\r", "\n", separator)  # what stands behind the last quote of a field, unless a stray quote opened it
    every = (found for found in quoted.finditer(text) if found[2] and text[found.end() : found.end() + 1] in proper)
    spans = [found.span(1) for found in every if _LINE_END.search(found[1])]
    found: set[str] = set()
    for line in _lines_outside(text, spans):
        fields = line.split(separator)
        if '"' not in line and len(fields) == width:
            found |= {class_name(name) for name in (fields[column], *fields[column].split())}
    return found - {""}


def _lines_outside(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[str]:
    """The lines but the first that lie outside of the spans."""
    position = 0
    parts = []
    for start, end in spans:
        parts.append(text[position:start])
        position = end
    _, *lines = _lines("\n".join([*parts, text[position:]]))
    yield from lines


def _lines(text: str) -> Iterator[str]:
    position = 0
    for found in _LINE_END.finditer(text):
        yield text[position : found.start()]
        position = found.end()
    yield text[position:]


def _fields(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [""])
    except csv.Error:  # a field longer than the csv module takes
        return line.split(separator)
