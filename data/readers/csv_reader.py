"""CSV and TSV files, read with pandas: every field unchanged, only the columns that are used, a part of the file at a time."""

from __future__ import annotations

import difflib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pandas

from cotune.data.readers.csv_dialect import (
    SEPARATORS,
    escape_stray_quotes,
    find_surplus_fields,
    find_torn_field,
    find_unclosed_quote,
    guess_separator,
    read_separator_line,
)
from cotune.data.readers.data_file import Columns, DataFile
from cotune.data.readers.encodings import decode_text
from cotune.data.skipped_records import UNREADABLE
from cotune.errors import DataError, reason_of

_MIN_DISTINCT_LINES = 10  # lines, in which a class may not come twice
_FEW_LINES = 1000
_FIELDS = 100_000  # of a CSV file that are parsed at once: only those of the columns that are used are kept
_CHARACTERS = 2**18  # that are parsed, or encoded, at once, where fields are long


def read_csv(file: DataFile, separator: str) -> Columns:
    """Return the columns of a file whose suffix means this separator; its first line may show another one.

    Raises:
        DataError: If it has none of the wanted columns, or a quote that no other one closes.
    """
    named, text = read_separator_line(decode_text(file.name, file.suffix, file.raw, file.config.encoding, lenient=file.lenient))
    separator = named or guess_separator(text, file.columns, separator)
    names = _header(file, text, separator)
    wanted = {name: names.index(name) for name in file.columns if name in names}
    if not wanted and not _is_header(text, separator, names, file.columns):
        raise missing_header_error(file, separator)
    if file.targets.has_classes and file.config.label in wanted:
        known = frozenset(file.labels) if file.lenient else None
        text = escape_stray_quotes(text, separator, len(names), wanted[file.config.label], known)
    if not file.lenient and (lines := find_torn_field(text, separator)) is not None:
        raise DataError(
            f"{file.name} has a double quote that opens a field in line {lines[0]}, and the next one, in line {lines[1]}, does"
            " not close it: the records between them would be one; write a quote within a field as two, or export the file again",
            code="data.malformed_csv",
        )
    values: dict[str, list[object]] = {name: [] for name in wanted}
    for rows in _read_rows(file, text, separator, names):
        for name, position in wanted.items():
            values[name] += rows[position].tolist()
    return names, {name: column[1:] for name, column in values.items()}


def _header(file: DataFile, text: str, separator: str) -> list[str]:
    """The first line is read as a record: pandas would rename a repeated column, and make a surplus field an index."""
    try:
        first = next(_parse_chunks(text, separator, nrows=1))
    except (pandas.errors.EmptyDataError, StopIteration) as error:
        raise DataError(
            f"{file.name} holds blank lines only: expected a line of column names, then records", code="data.no_records"
        ) from error
    except ValueError as error:
        raise _invalid_csv_error(file, text, separator, (), error) from error
    return [str(name).strip() for name in first.iloc[0]]


def _is_header(text: str, separator: str, names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a first line without the wanted columns may be shown as names: it could be a record of a file without names.

    It may where a name is nearly a wanted one, or where all are single words, none of which is a value of its own column in the
    records below, of which there are some.
    """
    try:
        rows = next(_parse_chunks(text, separator, names=range(len(names))))
    except ValueError:
        return bool(find_near_names(names, wanted))
    return look_like_column_names(names, [rows[position].iloc[1:].tolist() for position in range(len(names))], wanted)


def look_like_column_names(names: Sequence[str], below: Sequence[Sequence[object]], wanted: Sequence[str]) -> bool:
    """Return the same for the cells of a first row.

    Args:
        names: The cells.
        below: The values under each of them, in the first records.
        wanted: The columns that are looked for.
    """
    if find_near_names(names, wanted):
        return True
    repeated = any(name in values for name, values in zip(names, below, strict=True))
    return len(below[0]) >= _MIN_DISTINCT_LINES and not repeated and all(is_plain_name(name) for name in names)


def missing_header_error(file: DataFile, separator: str) -> DataError:
    """Return the sentence about a file that begins with something else than the names of its columns."""
    return DataError(
        f"{file.name} begins with a line that does not look like the names of its columns: expected one such as"
        f" {separator.join(file.columns)!r} above the records; add it, or name others with --set data.{file.key}=COLUMN"
        f" and --set data.{file.target}=COLUMN",
        code="data.missing_header",
    )


def find_near_names(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The names of columns that are nearly one of the wanted."""
    folded = [column.casefold() for column in wanted]
    return [name for name in names if difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.75)]


def displayable_names(names: Sequence[str], wanted: Sequence[str]) -> set[str]:
    """The names that an error may list: any other may be a record's text, in a file without names."""
    return {name for name in names if is_plain_name(name)} | set(find_near_names(names, wanted))


def is_plain_name(name: str) -> bool:
    """Whether a name is one word, as columns and keys have it; any other may be a record's text."""
    return re.fullmatch(r"[^\W\d][\w.-]{0,39}", name) is not None


def _read_rows(file: DataFile, text: str, separator: str, names: Sequence[str]) -> Iterator[pandas.DataFrame]:
    """All fields of a CSV file as text, some thousand lines at a time, with the line of names.

    A last field that is empty may be one too many, as some programs end each line with a separator. Where lenient, lines of more
    fields and what a quote never closes are left out and counted.
    """
    width = len(names)
    if file.lenient and (end := _end_before_unclosed_quote(text, separator)) is not None:
        file.skipped[UNREADABLE] += 1
        text = text[:end]
    try:
        for rows in _parse_chunks(
            text, separator, _lines_at_once(text, width), names=range(width + 1), on_bad_lines="warn" if file.lenient else "error"
        ):
            surplus = rows[width].map(lambda field: isinstance(field, str) and bool(field.strip()))
            if surplus.any() and not file.lenient:
                raise ValueError("a line holds more fields than there are columns")
            left_out = int(surplus.sum()) + rows.attrs["bad"]
            file.skipped.update({UNREADABLE: left_out} if left_out else {})
            yield rows[~surplus]
    except ValueError as error:
        if not file.lenient:
            raise _invalid_csv_error(file, text, separator, names, error) from error
        file.skipped[UNREADABLE] += 1


def _lines_at_once(text: str, width: int) -> int:
    """How many lines are parsed at once, for a bounded number of fields and, where lines are alike, of characters."""
    longest = _CHARACTERS * (text.count("\n") + 1) // (len(text) + 1)
    return 1 + min(_FIELDS // (width + 1), longest)


class _Encoded(io.RawIOBase):
    """A text as a file of UTF-8, encoded as it is read: a copy of all of it would be as large as the file."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            part = self._text[self._position : self._position + _CHARACTERS]
            self._position += len(part)
            self._rest = part.encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _parse_chunks(text: str, separator: str, lines: int = _FEW_LINES, **options: Any) -> Iterator[pandas.DataFrame]:
    """Parts of the file; the attribute "bad" says how many lines of too many fields were left out in one."""
    read = pandas.read_csv(
        io.BufferedReader(_Encoded(text), _CHARACTERS),  # StringIO would take four bytes a character
        sep=separator,
        header=None,
        dtype=object,  # fields as they stand; half a character cannot be kept otherwise
        keep_default_na=False,
        encoding_errors="surrogatepass",
        chunksize=lines,
        **options,
    )
    while True:
        with warnings.catch_warnings(record=True) as found:  # the same engine, so that the other lines stay as they are
            warnings.simplefilter("always", pandas.errors.ParserWarning)
            rows = next(read, None)
        if rows is None:
            return
        rows.attrs["bad"] = sum(str(warning.message).count("Skipping line") for warning in found)
        yield rows


def _end_before_unclosed_quote(text: str, separator: str) -> int | None:
    """Where the records end before a quote that is never closed; None without one."""
    end = None
    while (found := find_unclosed_quote(text[:end], separator)) is not None:
        end = found[0]
    return end


def _invalid_csv_error(file: DataFile, text: str, separator: str, names: Sequence[str], error: ValueError) -> DataError:
    reason = reason_of(error).removeprefix("Error tokenizing data. C error: ")
    opened = find_unclosed_quote(text, separator)
    width = len(names)
    if opened is not None:
        reason = f"the double quote that opens a field in line {opened[1]} is never closed"
    elif (surplus := find_surplus_fields(text, separator, width)) is not None:
        reason = f"Expected {width} fields in line {surplus[0]}, saw {surplus[1]}"
    return DataError(
        f"{file.name} is not valid {file.suffix} with {SEPARATORS[separator]} between fields ({reason}): export it again, with"
        " double quotes around fields that hold a separator, a quote or a line break",
        code="data.malformed_csv",
    )
