"""Inputs without labels, to be predicted: a column of a file, the images of a folder, or what was typed.

Every row has an answer, also one that cannot be used: anyone who joins predictions to a file counts on its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cotune.data.config import DataConfig, TaskName
from cotune.data.readers.csv_reader import displayable_names
from cotune.data.readers.data_file import DataFile
from cotune.data.readers.formats import READERS
from cotune.data.readers.images import SUFFIXES
from cotune.data.tasks.task import get_task
from cotune.data.types import USER, Chat, Input, Question, content_bytes
from cotune.errors import DataError, nearest, reason_of

_CHATS = "messages"  # the entry of [data] that names their column


@dataclass(frozen=True)
class Row:
    """One input.

    Attributes:
        shown: How it is named in the output.
        given: The input; None where it cannot be used.
        reason: Why it cannot be used.
    """

    shown: str
    given: Input | None
    reason: str = ""


def read_unlabeled(
    path: Path, task: TaskName, *, column: str | None = None, encoding: str = "utf-8", chats: bool = False
) -> list[Row]:
    """Return the rows of a file, in its order; or the images of a folder and of the folders in it, by name.

    Args:
        path: CSV, TSV, JSON or Parquet; for images also a folder.
        task: Of the model.
        column: That holds the inputs; None: "text", or "image".
        encoding: Of a CSV, TSV or JSON file.
        chats: Whether the column holds chats, which a model is to answer.

    Raises:
        DataError: For a file that cannot be read, or has no such column.
    """
    key = _CHATS if chats else get_task(task).key
    if path.is_dir() and key == "image":
        return _make_rows(_file(path, b"", key, key), task, list(_images(path)))
    wanted = column or key
    file = _file(path, _content(path), key, wanted, encoding)
    names, values = READERS[file.suffix](file)
    if names.count(wanted) != 1:
        known = displayable_names(names, (wanted,))
        hint = nearest(wanted, known) if known else ""
        problem = "no column" if wanted not in names else f"{names.count(wanted)} columns"
        raise DataError(
            f"{path} has {problem} {wanted!r}: name the one to predict with --{key}{hint}".removesuffix("."),
            code="data.missing_column",
        )
    return _make_rows(file, task, values[wanted])


def read_typed(given: Sequence[str], task: TaskName, *, chats: bool = False) -> list[Row]:
    """Return texts as they were typed; for an image model, paths of images; of chats each text is what a user says.

    Args:
        given: The texts, or paths of images.
        task: Of the model.
        chats: Whether each text is what a user says in a chat.

    Returns:
        A row for each input, in order; one that cannot be used has a reason.
    """
    if chats:
        said = [[{"role": USER, "content": each}] if each.strip() else None for each in given]
        return _make_rows(_file(Path("typed"), b"", _CHATS, _CHATS), task, said)
    key = get_task(task).key
    return _make_rows(_file(Path("typed"), b"", key, key), task, [Path(each) for each in given] if key == "image" else given)


def read_questions(
    path: Path, task: TaskName, *, context: str | None = None, question: str | None = None, encoding: str = "utf-8"
) -> list[Row]:
    """Return the questions of a file with the texts that they are about, in its order.

    Args:
        path: CSV, TSV, JSON or Parquet.
        task: Of the model.
        context: The column of the texts; None: "context".
        question: The column of the questions; None: "question".
        encoding: Of a CSV, TSV or JSON file.

    Raises:
        DataError: For a file that cannot be read, or lacks one of the columns.
    """
    named = {"context": context or "context", "question": question or "question"}
    try:
        config = DataConfig.model_validate({"source": str(path), **named, "encoding": encoding})
    except ValueError:
        raise DataError(
            f"the columns {named['context']!r} and {named['question']!r}, or the encoding {encoding!r}, cannot be read:"
            " expected two different columns",
            code="data.unknown_encoding",
        ) from None
    file = DataFile(str(path), path, _content(path), config, "context", target="answers")
    names, values = READERS[file.suffix](file)
    for key, column in named.items():
        if names.count(column) != 1:
            raise DataError(f"{path} has no single column {column!r}: name it with --{key}", code="data.missing_column")
    pairs = zip(values[named["question"]], values[named["context"]], strict=True)
    return [_row(file, task, number, pair) for number, pair in enumerate(pairs, 1)]


def read_typed_questions(contexts: Sequence[str], question: str, task: TaskName) -> list[Row]:
    """Return one question about texts as they were typed."""
    file = _file(Path("typed"), b"", "context", "context")
    return [_row(file, task, number, (question, context)) for number, context in enumerate(contexts, 1)]


def inputs_hash(inputs: Sequence[Input]) -> str:
    """SHA-256 over the inputs, in their order."""
    total = hashlib.sha256()
    for given in inputs:
        total.update(hashlib.sha256(content_bytes(given)).digest())
    return total.hexdigest()


def _make_rows(file: DataFile, task: TaskName, values: Sequence[object]) -> list[Row]:
    return [_row(file, task, number, value) for number, value in enumerate(values, 1)]


def _row(file: DataFile, task: TaskName, number: int, value: object) -> Row:
    shown = value if isinstance(value, str) else str(value) if isinstance(value, Path) else f"record {number}"
    try:
        found = get_task(task).unlabeled(file, number, value)
    except DataError as error:
        return Row(shown, None, str(error))
    if isinstance(found, str):
        return Row(shown, None, found)
    given = found[0]
    if isinstance(given, tuple):
        return Row(" ".join(given), given)
    if isinstance(given, Question):
        return Row(given.question, given)
    if isinstance(given, Chat):
        return Row(given.asked[-1][1], given)
    return Row(given if isinstance(given, str) else shown, given)


def _file(path: Path, raw: bytes, key: str, column: str, encoding: str = "utf-8") -> DataFile:
    label = "label" if column != "label" else "text"  # no label is read; a column must not be both
    try:
        config = DataConfig.model_validate({"source": str(path), key: column, "label": label, "encoding": encoding})
    except ValueError:
        raise DataError(
            f"the column {column!r} or the encoding {encoding!r} is unknown: expected existing names",
            code="data.unknown_encoding",
        ) from None
    return DataFile(str(path), path, raw, config, key, target=_CHATS if key == _CHATS else "label")


def _content(path: Path) -> bytes:
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path} cannot be predicted: expected a file ending in one of {', '.join(sorted(READERS))}",
            code="data.unknown_format",
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({reason_of(error)}): check the path and its permissions", code="data.not_readable"
        ) from None
    if not content:
        raise DataError(f"{path} is empty (0 bytes): expected records", code="data.no_records")
    return content


def _images(folder: Path) -> Iterator[Path]:
    try:
        found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    except OSError as error:
        raise DataError(
            f"{folder} cannot be opened ({reason_of(error)}): check its permissions", code="data.not_readable"
        ) from None
    if not found:
        raise DataError(f"{folder} holds no images: expected files ending in {', '.join(sorted(SUFFIXES))}", code="data.no_files")
    yield from found
