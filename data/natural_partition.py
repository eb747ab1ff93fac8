"""Who holds which record by a column of the file, such as its hospital: the partition that is really there.

Drawn partitions decide what a federation gains; one that is there decides it as it will be.
"""

from __future__ import annotations

import re

from cotune.data.config import DataConfig, TaskName
from cotune.data.record_reading import read_records
from cotune.data.records import Records
from cotune.data.types import Input
from cotune.errors import DataError

_SCHEME = "column:"
_LENGTH = 63


def get_partition_column(partition: str) -> str | None:
    """The column that names the organizations (`simulation.partition = "column:NAME"`); None where records are dealt out."""
    return partition.removeprefix(_SCHEME) if partition.startswith(_SCHEME) else None


def read_owners(data: DataConfig, task: TaskName, records: Records, column: str) -> tuple[str, ...]:
    """Return the organization of each record, by a name that a folder can have.

    Of a text that `data.deduplicate` keeps once, it is the organization that comes first in the file.

    Args:
        data: Source and columns of the records.
        task: As which they are read.
        records: The records that `data` and `task` give.
        column: The column of the organizations.

    Raises:
        DataError: For a file without the column, records without a value in it, or fewer than two values.
    """
    every = data.model_copy(update={"deduplicate": False})
    whole = read_records(every, task=task)
    try:
        named = read_records(every.model_copy(update={"unit": column}), task=task)
    except DataError as error:  # it advises about the column of units, as which this one is read
        raise DataError(str(error).replace("--set data.unit=", "--by "), code=error.code) from None
    if named.inputs != whole.inputs:
        lacking = abs(len(whole) - len(named))
        raise DataError(
            f"{lacking} records of {records.source} have nothing in the column {column!r} (simulation.partition): expected the"
            " organization of every record; fill it in, or leave these records out",
            code="data.missing_organization",
        )
    folders = _folders(dict.fromkeys(named.units))
    if len(folders) < 2:
        raise DataError(
            f"the column {column!r} of {records.source} has one value: expected two organizations or more; name another column",
            code="data.one_organization",
        )
    first: dict[tuple[Input, str], str] = {}
    for given, unit, owner in zip(whole.inputs, whole.units or [""] * len(whole), named.units, strict=True):
        first.setdefault((given, unit), folders[owner])
    if not data.deduplicate:
        return tuple(folders[owner] for owner in named.units)
    return tuple(first[pair] for pair in zip(records.inputs, records.units or [""] * len(records), strict=True))


def _folders(values: dict[str, None]) -> dict[str, str]:
    """Value -> a name of letters, digits and hyphens, each its own."""
    found: dict[str, str] = {}
    for number, value in enumerate(values, start=1):
        name = re.sub(r"[^\w]+", "-", value).strip("-_")[:_LENGTH]
        found[value] = name if name and name not in found.values() else f"{name[: _LENGTH - 8]}-{number}".strip("-")
    return found
