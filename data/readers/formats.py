"""The file formats that records come in: CSV, TSV, JSON, Parquet and Excel.

Every reader gives the names of a file's columns and the values of those that are wanted, or raises one `DataError` sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cotune.data.readers.csv_reader import read_csv
from cotune.data.readers.data_file import Columns, DataFile
from cotune.data.readers.excel_reader import read_excel
from cotune.data.readers.json_reader import read_json
from cotune.data.readers.parquet_reader import read_parquet

READERS: dict[str, Callable[[DataFile], Columns]] = {
    ".csv": partial(read_csv, separator=","),
    ".tsv": partial(read_csv, separator="\t"),
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".parquet": read_parquet,
    ".xlsx": read_excel,
}
