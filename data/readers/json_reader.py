"""JSON files: one object per line, or one list of objects, of which one that is nested too deep does not spoil the others."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cotune.data.readers.data_file import Columns, DataFile
from cotune.data.readers.encodings import decode_text
from cotune.data.skipped_records import UNREADABLE
from cotune.errors import DataError, reason_of

_BETWEEN = re.compile(r"\s*")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)  # or a string, in which brackets are letters


def iterate_elements(text: str, parse_int: Callable[[str], object]) -> Iterator[Any]:
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


# Text formats are not read with the `datasets` library. It infers types, chunk by chunk: the labels "01" and "1" become
# one, the label 1 reads 1.0 where another is missing, a column of dates becomes timestamps, and a surplus first field
# an index. It also copies private text to a cache on disk.


def read_json(file: DataFile) -> Columns:
    """Return the columns of a file with one object per line, or one array of objects.

    Raises:
        DataError: If it is not JSON, or holds something else than objects, and the file is not read leniently.
    """
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
            raise DataError(
                f"{file.name} holds a {type(row).__name__} in {where}, expected an object: {_example(file)}",
                code="data.malformed_json",
            )
        rows.append(row)
    if len(rows) == 1 and not file.lenient and not file.targets.has_lists and _is_whole_table(rows[0], file.columns):
        raise DataError(
            f"{file.name} holds all of its records in one object: expected one object per line, or one array of objects, as in"
            f' {_example(file)}; with pandas, save it with to_json(orient="records", lines=True)',
            code="data.malformed_json",
        )
    if not rows and not file.lenient:
        raise DataError(
            f"{file.name} holds no records: expected one object per line, as in {_example(file)}", code="data.no_records"
        )
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
        return _parse(text, file.lenient)
    except (ValueError, RecursionError) as error:
        reason = f"line {first_line}: {reason_of(error)}"
        if isinstance(error, json.JSONDecodeError):
            reason = f"line {first_line + error.lineno - 1}, column {error.colno}: {error.msg}"
        expected = "expected one object per line, or one array of objects, as in"
        raise DataError(
            f"{file.name} is not valid JSON ({reason}): {expected} {_example(file)}", code="data.malformed_json"
        ) from error


def _parse(text: str, lenient: bool) -> Any:
    try:
        return json.loads(text, parse_int=_parse_int)
    except RecursionError:
        if not (lenient and text.lstrip().startswith("[")):
            raise
        return list(iterate_elements(text, _parse_int))


def _parse_int(digits: str) -> int | str:
    """A number, or its digits where it has more than Python reads: one record must not make its whole list unreadable."""
    try:
        return int(digits)
    except ValueError:
        return digits


def _example(file: DataFile) -> str:
    return json.dumps(dict.fromkeys(file.columns, "…"), ensure_ascii=False)


JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")  # formats without a table of columns


def _decode(file: DataFile) -> str:
    return decode_text(file.name, file.suffix, file.raw, file.config.encoding, lenient=file.lenient)
