"""The file formats that records come in: CSV, TSV, JSON, Parquet and Excel.

Every reader gives the names of a file's columns and the values of those that are wanted, or raises one `DataError` sentence.

The elements of a JSON list, one by one: one that is nested too deep to be parsed must not make the others unreadable.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from cotune.data.config import DataConfig
from cotune.data.left_out import UNREADABLE
from cotune.data.readers.csv_reader import are_names, no_names, read_csv
from cotune.data.readers.encodings import decoded
from cotune.errors import DataError, reason_of

_BETWEEN = re.compile(r"\s*")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)  # or a string, in which brackets are letters


def elements(text: str, parse_int: Callable[[str], object]) -> Iterator[Any]:
    """Yield the elements of a list; None for one that is nested too deep.

    Raises ValueError where what is read one by one is no list; the list is expected to have no other fault.
    """
    decoder = json.JSONDecoder(parse_int=parse_int)
    at = _after_space(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        try:
            value, at = decoder.raw_decode(text, at)
        except RecursionError:
            value = None
            at = _end_of_nested(text, at)
        yield value
        at = _after_comma(text, at)


def _end_of_nested(text: str, at: int) -> int:
    """Where the list or object that begins here ends. Raises ValueError where it does not."""
    depth = 0
    for found in _BRACKET.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    raise ValueError(f"what begins at character {at + 1} does not end")


def _after_comma(text: str, at: int) -> int:
    """Where the next element begins, or the list ends."""
    at = _after_space(text, at)
    if text[at : at + 1] == ",":
        return _after_space(text, at + 1)
    if text[at : at + 1] != "]":
        raise ValueError(f"expected a comma or the end of the list at character {at + 1}")
    return at


def _after_space(text: str, at: int) -> int:
    return at + len(_BETWEEN.match(text, at)[0])  # type: ignore[index]  # matches everywhere


@dataclass(frozen=True)
class DataFile:
    """A file's bytes, and what an error says about it. key: which entry of the configuration names the column of the inputs.

    lenient: a line that cannot be read is left out and counted in `skipped`, as a failure would tell that somebody holds it.
    labels: the plan's classes, where they are known.
    """

    name: str
    path: Path
    raw: bytes
    config: DataConfig
    key: str = "text"
    lenient: bool = False
    labels: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()

    @property
    def wanted(self) -> tuple[str, str]:
        """The columns of the inputs and of the labels."""
        return str(getattr(self.config, self.key)), self.config.label

    @property
    def columns(self) -> tuple[str, ...]:
        """Those, and the column of the units where there is one."""
        return self.wanted if self.config.unit is None else (*self.wanted, self.config.unit)


_MANY = 1000  # rows of a sheet, in which a column's name is none of its values

Columns = tuple[list[str], dict[str, list[object]]]  # the names of all columns; the values of those wanted and there

# Text formats are not read with the `datasets` library. It infers types, chunk by chunk: the labels "01" and "1" become
# one, the label 1 reads 1.0 where another is missing, a column of dates becomes timestamps, and a surplus first field
# an index. It also copies private text to a cache on disk.


def _json(file: DataFile) -> Columns:
    """One object per line, or one array of objects."""
    text = _decode(file)
    found: list[tuple[str, Any]]
    if text.lstrip().startswith("[") and not (file.lenient and _is_lines(text)):
        found = [(f"record {number}", row) for number, row in enumerate(_loads(file, text, 1), 1)]
    else:  # str.splitlines would also cut at a line separator inside a string
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [(f"line {number}", _loads_line(file, line, number)) for number, line in lines]
    rows: list[dict[str, object]] = []
    for where, row in found:
        if not isinstance(row, dict) and file.lenient:
            file.skipped[UNREADABLE] += 1
            continue
        if not isinstance(row, dict):
            raise DataError(f"{file.name} holds a {type(row).__name__} in {where}, expected an object: {_example(file)}")
        rows.append(row)
    if len(rows) == 1 and not file.lenient and _is_whole_table(rows[0], file.columns):
        raise DataError(
            f"{file.name} holds all of its records in one object: expected one object per line, or one array of objects, as in"
            f' {_example(file)}; with pandas, save it with to_json(orient="records", lines=True)'
        )
    if not rows and not file.lenient:
        raise DataError(f"{file.name} holds no records: expected one object per line, as in {_example(file)}")
    count = Counter(name for row in rows for name in row)
    names = [name for name in count if name in file.columns or count[name] > 1]  # a key of one record may be a text
    wanted = file.columns if file.lenient else [name for name in file.columns if name in names]
    return names, {name: [row.get(name) for row in rows] for name in wanted}


def _is_whole_table(row: Mapping[str, object], columns: Sequence[str]) -> bool:
    """Whether the one object of a file holds a table: a list of records, or every column (as pandas writes it) as one value."""
    held = [row.get(name) for name in columns[:2]]
    records = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values())
    return all(isinstance(value, dict | list) and len(value) > 1 for value in held) or (held == [None, None] and records)


def _is_lines(text: str) -> bool:
    """Whether the first line is a value by itself, with others below: a list there is one bad record, not the file."""
    first, *others = [line for line in text.split("\n") if line.strip()]
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(others)


def _loads_line(file: DataFile, text: str, number: int) -> Any:
    """What a line holds; None where it cannot be read, if the file is read leniently."""
    try:
        return _loads(file, text, number)
    except DataError:
        if not file.lenient:
            raise
        return None


def _loads(file: DataFile, text: str, first_line: int) -> Any:
    try:
        return _parsed(text, file.lenient)
    except (ValueError, RecursionError) as error:
        reason = f"line {first_line}: {reason_of(error)}"
        if isinstance(error, json.JSONDecodeError):
            reason = f"line {first_line + error.lineno - 1}, column {error.colno}: {error.msg}"
        expected = "expected one object per line, or one array of objects, as in"
        raise DataError(f"{file.name} is not valid JSON ({reason}): {expected} {_example(file)}") from error


def _parsed(text: str, lenient: bool) -> Any:
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        if not (lenient and text.lstrip().startswith("[")):
            raise
        return list(elements(text, _whole))


def _whole(digits: str) -> int | str:
    """A number, or its digits where it has more than Python reads: one record must not make its whole list unreadable."""
    try:
        return int(digits)
    except ValueError:
        return digits


def _example(file: DataFile) -> str:
    return json.dumps(dict.fromkeys(file.columns, "…"), ensure_ascii=False)


def _parquet(file: DataFile) -> Columns:
    """Read with `datasets`: it knows the class names that Hugging Face keeps beside integer labels; they are used."""
    from datasets import ClassLabel, Dataset
    from datasets import Image as ImageFeature
    from datasets.table import InMemoryTable
    from pyarrow import BufferReader, parquet

    try:
        opened = parquet.ParquetFile(BufferReader(file.raw))
        names = list(opened.schema_arrow.names)
        present = [name for name in file.columns if names.count(name) == 1]
        # Dataset.from_parquet would copy the file to a cache, and take "[1]" in its path for a pattern.
        table = Dataset(InMemoryTable(opened.read(columns=present, use_threads=False)), fingerprint="unused")
        for name, feature in dict(table.features).items():
            if isinstance(feature, ImageFeature):  # decoding is ours, with limits
                table = table.cast_column(name, ImageFeature(decode=False))
        values = _values(file, table)
        for name, feature in table.features.items():
            inner = getattr(feature, "feature", None)  # of a list
            if isinstance(feature, ClassLabel):
                values[name] = [_named(file, name, feature.names, *pair) for pair in enumerate(values[name], 1)]
            elif isinstance(inner, ClassLabel):
                rows = enumerate(values[name], 1)
                values[name] = [row and [_named(file, name, inner.names, n, tag) for tag in row] for n, row in rows]
    except DataError:
        raise
    except Exception as error:  # damaged bytes raise anything: OSError, ValueError, KeyError, TypeError …
        raise DataError(f"{file.name} is not valid Parquet ({reason_of(error)}): export it again") from error
    return names, values


def _named(file: DataFile, column: str, names: Sequence[str], row: int, number: int | None) -> object:
    """The name of a class; -1 is how Hugging Face data sets mark a record without a label; None: a number without a name."""
    if number is None or number < 0:
        return None
    if number < len(names):
        return names[number]
    if file.lenient:
        return ...  # no word, so that its record is left out
    raise DataError(
        f"{file.name} has the class number {number} in column {column!r} of record {row}, and names {len(names)} classes (0 to"
        f" {len(names) - 1}): expected a name for every number; save the data set again with all of its class names"
    )


def _xlsx(file: DataFile) -> Columns:
    """The one sheet of an Excel workbook that holds something."""
    try:
        sheets = pandas.read_excel(
            io.BytesIO(file.raw), sheet_name=None, header=None, dtype=object, keep_default_na=False, engine="openpyxl"
        )
    except ImportError as error:
        raise DataError(
            f'{file.name} needs the Python package openpyxl, which is not installed: pip install "cotune[excel]", or save the'
            " sheet as CSV UTF-8"
        ) from error
    except Exception as error:  # damaged archives raise anything
        raise DataError(
            f"{file.name} is not a valid Excel workbook ({type(error).__name__}): save it again, or as CSV"
        ) from error
    filled = [rows for rows in map(_without_blank_rows, sheets.values()) if len(rows)]
    if len(filled) != 1:
        raise DataError(f"{file.name} has {len(filled)} sheets with records: expected one; save the sheet as a file of its own")
    names = ["" if _is_blank(name) else str(name).strip() for name in filled[0].iloc[0]]
    _check_names(file, names, filled[0])
    values = {name: filled[0][names.index(name)].iloc[1:].tolist() for name in file.columns if name in names}
    return names, {name: [_cell(value) for value in column] for name, column in values.items()}


def _without_blank_rows(sheet: pandas.DataFrame) -> pandas.DataFrame:
    """As in the other formats, where a blank line is no record, wherever it stands and whatever format its cells have."""
    return sheet[[not all(map(_is_blank, row)) for row in sheet.itertuples(index=False)]]


def _is_blank(cell: object) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def _check_names(file: DataFile, names: Sequence[str], sheet: pandas.DataFrame) -> None:
    """Refuses a first row that may be a title or a record, of which no cell is shown. Raises DataError."""
    if set(names) & set(file.columns):
        return
    below = [sheet[column].iloc[1:_MANY].map(str).tolist() for column in sheet.columns]
    if not are_names(names, below, file.columns):
        raise no_names(file, ", ")


def _cell(value: object) -> object:
    """A date without a time of day as other formats have it."""
    return value.date() if isinstance(value, datetime) and value.time() == time() else value


def _values(file: DataFile, table: Any) -> dict[str, list[Any]]:
    """The values of each column; where lenient, without the rows that cannot be read, such as a text that is no UTF-8."""
    try:
        return dict(table[:])
    except Exception:
        if not file.lenient:
            raise
    rows = []
    for number in range(len(table)):
        try:
            rows.append(table[number])
        except Exception:  # as above, damaged values raise anything
            file.skipped[UNREADABLE] += 1
    return {name: [row[name] for row in rows] for name in table.column_names}


READERS: dict[str, Callable[[DataFile], Columns]] = {
    ".csv": partial(read_csv, separator=","),
    ".tsv": partial(read_csv, separator="\t"),
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".parquet": _parquet,
    ".xlsx": _xlsx,
}


JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")  # formats without a table of columns


def _decode(file: DataFile) -> str:
    return decoded(file.name, file.suffix, file.raw, file.config.encoding, lenient=file.lenient)


def word_of(file: DataFile, column: str, number: int, value: object) -> str:
    """A value as the string that every format would give it; "" if it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float | Decimal | date):
        return str(value)
    got = f"a {type(value).__name__} in column {column!r} of record {number}"
    raise DataError(f"{file.name} holds {got}, expected text: convert that column")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
