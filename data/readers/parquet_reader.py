"""Parquet files, with the class names that Hugging Face keeps beside integer labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cotune.data.readers.data_file import Columns, DataFile
from cotune.data.skipped_records import UNREADABLE
from cotune.errors import DataError, reason_of


def read_parquet(file: DataFile) -> Columns:
    """Read with Arrow: the schema that Hugging Face writes into the file says which numbers are classes, and nothing else.

    `datasets` would decode what that schema calls images, sounds or documents, at any depth, and fetch the addresses in them.
    """
    from datasets import ClassLabel, Features
    from pyarrow import BufferReader, parquet

    try:
        opened = parquet.ParquetFile(BufferReader(file.raw))
        names = list(opened.schema_arrow.names)
        present = [name for name in dict.fromkeys(file.columns) if names.count(name) == 1]
        table = opened.read(columns=present, use_threads=False)
        values = _values(file, table)
        for name, feature in Features.from_arrow_schema(table.schema).items():
            inner = getattr(feature, "feature", None)  # of a list
            if isinstance(feature, ClassLabel):
                values[name] = [_named(file, name, feature.names, *pair) for pair in enumerate(values[name], 1)]
            elif isinstance(inner, ClassLabel):
                rows = enumerate(values[name], 1)
                values[name] = [row and [_named(file, name, inner.names, n, tag) for tag in row] for n, row in rows]
    except DataError:
        raise
    except Exception as error:  # damaged bytes raise anything: OSError, ValueError, KeyError, TypeError …
        raise DataError(
            f"{file.name} is not valid Parquet ({reason_of(error)}): export it again", code="data.malformed_parquet"
        ) from error
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
        f" {len(names) - 1}): expected a name for every number; save the data set again with all of its class names",
        code="data.unnamed_class",
    )


def _values(file: DataFile, table: Any) -> dict[str, list[Any]]:
    """The values of each column; where lenient, without the rows that cannot be read, such as a text that is no UTF-8."""
    try:
        return dict(table.to_pydict())
    except Exception:
        if not file.lenient:
            raise
    rows = []
    for number in range(len(table)):
        try:
            rows.append({name: table.column(name)[number].as_py() for name in table.column_names})
        except Exception:  # as above, damaged values raise anything
            file.skipped[UNREADABLE] += 1
    return {name: [row[name] for row in rows] for name in table.column_names}
