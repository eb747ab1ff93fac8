"""Excel workbooks: the one sheet that holds something."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime, time

import pandas

from cotune.data.readers.csv_reader import look_like_column_names, missing_header_error
from cotune.data.readers.data_file import Columns, DataFile
from cotune.errors import DataError

_MAX_CHECKED_ROWS = 1000  # rows of a sheet, in which a column's name is none of its values


def read_excel(file: DataFile) -> Columns:
    """Return the columns of the one sheet of an Excel workbook that holds something.

    Raises:
        DataError: If openpyxl is not installed, the file is no workbook, or another number of sheets than one holds records.
    """
    try:
        sheets = pandas.read_excel(
            io.BytesIO(file.raw), sheet_name=None, header=None, dtype=object, keep_default_na=False, engine="openpyxl"
        )
    except ImportError as error:
        raise DataError(
            f'{file.name} needs the Python package openpyxl, which is not installed: pip install "cotune[excel]", or save the'
            " sheet as CSV UTF-8",
            code="data.missing_package",
        ) from error
    except Exception as error:  # damaged archives raise anything
        raise DataError(
            f"{file.name} is not a valid Excel workbook ({type(error).__name__}): save it again, or as CSV",
            code="data.malformed_excel",
        ) from error
    filled = [rows for rows in map(_without_blank_rows, sheets.values()) if len(rows)]
    if len(filled) != 1:
        raise DataError(
            f"{file.name} has {len(filled)} sheets with records: expected one; save the sheet as a file of its own",
            code="data.several_sheets",
        )
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
    below = [sheet[column].iloc[1:_MAX_CHECKED_ROWS].map(str).tolist() for column in sheet.columns]
    if not look_like_column_names(names, below, file.columns):
        raise missing_header_error(file, ", ")


def _cell(value: object) -> object:
    """A date without a time of day as other formats have it."""
    return value.date() if isinstance(value, datetime) and value.time() == time() else value
