"""The file formats that records come in, and the part of a plan that says where they are and how to read them.

Every reader gives the names of a file's columns and the values of those that are wanted, or raises one `DataError` sentence.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pandas
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cotune.models.errors import DataError

__all__ = ["JSON_SUFFIXES", "READERS", "UNREADABLE", "Columns", "DataConfig", "DataFile", "is_unicode", "reason_of", "word_of"]


class DataConfig(BaseModel):
    """Where an organisation's records are, and which of their columns are used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        min_length=1,
        description="a file, a folder with one file per organisation, or package:NAME for data in a Python package",
    )
    text: str = Field(default="text", min_length=1, description="the column that holds the text, or the words of one")
    image: str = Field(default="image", min_length=1, description="the column that holds an image: its path, or (Parquet) bytes")
    label: str = Field(default="label", min_length=1, description="the column that holds the label, or the tag of each word")
    unit: str | None = Field(
        default=None,
        min_length=1,
        description="the column that says whose a record is; default: called like privacy.unit",
    )
    encoding: str = Field(default="utf-8", description="of a CSV, TSV or JSON file, such as utf-8, latin-1 or utf-16")
    deduplicate: bool = Field(
        default=False, description="of records with the same input keep the first, or none if their labels differ"
    )

    def without_units(self) -> DataConfig:
        """For records of which nobody need say whose they are, such as a coordinator's test set."""
        return self.model_copy(update={"unit": None})

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "a".encode(value)
        except (LookupError, ValueError) as error:
            raise ValueError(f"{value!r} is not a text encoding: expected one such as utf-8 or latin-1") from error
        return value

    @model_validator(mode="after")
    def _different_columns(self) -> DataConfig:
        for key, other in (("text", "label"), ("image", "label"), ("unit", "label"), ("unit", "text"), ("unit", "image")):
            if getattr(self, key) == getattr(self, other):
                raise ValueError(f"{key} and {other} are both {getattr(self, key)!r}: expected two different columns")
        return self


@dataclass(frozen=True)
class DataFile:
    """A file's bytes, and what an error says about it. key: which entry of the configuration names the column of the inputs.

    lenient: a line that cannot be read is left out and counted in `skipped`, as a failure would tell that somebody holds it.
    """

    name: str
    path: Path
    raw: bytes
    config: DataConfig
    key: str = "text"
    lenient: bool = False
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


_HALF = "cotune.half"  # in UTF-16 surrogateescape cannot stand for half of a pair
codecs.register_error(_HALF, lambda error: ("\udc00", getattr(error, "end")))  # noqa: B009

UNREADABLE = "unreadable"  # why a record was left out, see Records.skipped
Columns = tuple[list[str], dict[str, list[object]]]  # the names of all columns; the values of those wanted and there

# Text formats are not read with the `datasets` library. It infers types, chunk by chunk: the labels "01" and "1" become
# one, the label 1 reads 1.0 where another is missing, a column of dates becomes timestamps, and a surplus first field
# an index. It also copies private text to a cache on disk.


def _csv(file: DataFile, separator: str) -> Columns:
    text = _decode(file)
    try:  # the header is read as a record: pandas would rename a repeated column, and make a surplus field an index
        frame = _frame(file, text, separator)
    except pandas.errors.EmptyDataError as error:
        raise DataError(f"{file.name} holds blank lines only: expected a line of column names, then records") from error
    except ValueError as error:
        reason = reason_of(error).removeprefix("Error tokenizing data. C error: ")
        raise DataError(
            f"{file.name} is not valid {file.suffix} ({reason}): export it again, with double quotes around"
            " fields that hold a separator, a quote or a line break"
        ) from error
    names = [str(name).strip() for name in frame.iloc[0]]
    return names, {name: frame[names.index(name)].iloc[1:].tolist() for name in file.columns if name in names}


def _frame(file: DataFile, text: str, separator: str, rows: int | None = None) -> pandas.DataFrame:
    """All fields of a CSV file as text; where lenient, without the lines of too many fields and what a quote never closes."""
    read = partial(
        pandas.read_csv,
        sep=separator,
        header=None,
        dtype=object,  # fields as they stand; half a character cannot be kept otherwise
        keep_default_na=False,
        nrows=rows,
        encoding_errors="surrogatepass",
    )
    if not file.lenient:
        return read(io.StringIO(text))
    try:
        with warnings.catch_warnings(record=True) as found:  # the same engine, so that the other lines stay as they are
            warnings.simplefilter("always", pandas.errors.ParserWarning)
            frame = read(io.StringIO(text), on_bad_lines="warn")
    except pandas.errors.ParserError as error:
        opened = re.search(r"EOF inside string starting at row (\d+)", str(error))
        if opened is None or rows is not None:
            raise
        file.skipped[UNREADABLE] += 1
        return _frame(
            file,
            text,
            separator,
            _rows_before(int(opened[1]), lambda most: read(io.StringIO(text), nrows=most, on_bad_lines="skip")),
        )
    left_out = sum(str(warning.message).count("Skipping line") for warning in found)
    file.skipped.update({UNREADABLE: left_out} if left_out else {})
    return frame


def _rows_before(row: int, read: Callable[[int], object]) -> int:
    """How many rows can be read before a quote that is never closed: at most `row`, which counts left-out and blank lines too."""

    def fails(most: int) -> bool:
        try:
            read(most)
        except pandas.errors.ParserError:
            return True
        return False

    return max(bisect_left(range(1, row + 1), True, key=fails), 1)


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
    if not rows and not file.lenient:
        raise DataError(f"{file.name} holds no records: expected one object per line, as in {_example(file)}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    wanted = file.columns if file.lenient else [name for name in file.columns if name in names]
    return names, {name: [row.get(name) for row in rows] for name in wanted}


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
        return json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        reason = f"line {first_line}: {reason_of(error)}"
        if isinstance(error, json.JSONDecodeError):
            reason = f"line {first_line + error.lineno - 1}, column {error.colno}: {error.msg}"
        expected = "expected one object per line, or one array of objects, as in"
        raise DataError(f"{file.name} is not valid JSON ({reason}): {expected} {_example(file)}") from error


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
        table = Dataset(InMemoryTable(opened.read(columns=present)), fingerprint="unused")
        for name, feature in dict(table.features).items():
            if isinstance(feature, ImageFeature):  # decoding is ours, with limits
                table = table.cast_column(name, ImageFeature(decode=False))
        values = _values(file, table)
        for name, feature in table.features.items():
            inner = getattr(feature, "feature", None)  # of a list
            if isinstance(feature, ClassLabel):
                values[name] = [_class_name(feature.names, number) for number in values[name]]
            elif isinstance(inner, ClassLabel):
                values[name] = [row and [_class_name(inner.names, number) for number in row] for row in values[name]]
    except Exception as error:  # damaged bytes raise anything: OSError, ValueError, KeyError, TypeError …
        raise DataError(f"{file.name} is not valid Parquet ({reason_of(error)}): export it again") from error
    return names, values


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


def _class_name(names: Sequence[str], number: int | None) -> str | None:
    """The name of a class; -1 is how Hugging Face data sets mark a record without a label, and a number beyond them has none."""
    return names[number] if number is not None and 0 <= number < len(names) else None


READERS: dict[str, Callable[[DataFile], Columns]] = {
    ".csv": partial(_csv, separator=","),
    ".tsv": partial(_csv, separator="\t"),
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".parquet": _parquet,
}


JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")  # formats without a table of columns


def _decode(file: DataFile) -> str:
    """The file's text. Where lenient, a byte that is none of it becomes half a character, by which its record is left out."""
    encoding = file.config.encoding
    wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    if file.lenient and (wide or not file.raw.startswith((b"\xff\xfe", b"\xfe\xff"))):
        with suppress(UnicodeError):
            text = file.raw.decode(encoding, _HALF if wide else "surrogateescape")
            return text.replace("\0", "\udc00").removeprefix("\ufeff")
    binary = f"{file.name} is not text (it holds NUL bytes): expected {file.suffix} content, so export it again"
    try:
        text = file.raw.decode(encoding)
    except UnicodeError as error:
        if file.raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{file.name} is utf-16 text, not {encoding}: use --set data.encoding=utf-16") from error
        if b"\0" in file.raw:
            raise DataError(binary) from error
        detail = f"byte {error.start} cannot be decoded" if isinstance(error, UnicodeDecodeError) else reason_of(error)
        raise DataError(
            f"{file.name} is not {encoding} text ({detail}): save it as utf-8, or try --set data.encoding=latin-1"
        ) from error
    if "\0" in text:
        raise DataError(binary)
    return text.removeprefix("\ufeff")


def reason_of(error: Exception) -> str:
    """The first line of what a library said, without its full stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


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
