"""A file of records as its readers get it, and the values that all formats have in common."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from pathlib import Path

from cotune.data.config import DataConfig
from cotune.data.tasks.target_columns import TARGET_COLUMNS, TargetColumns
from cotune.errors import DataError


@dataclass(frozen=True)
class DataFile:
    """The bytes of a file, and what its readers must know.

    Attributes:
        name: What an error calls the file.
        path: Where it is.
        raw: Its content.
        config: Which columns are used.
        key: The entry of the configuration that names the column of the inputs.
        target: The entry that names the column of the targets.
        lenient: Whether a line that cannot be read is left out and counted, as a failure would reveal that somebody holds it.
        labels: The plan's classes, where they are known.
        skipped: How many lines were left out, by the reason.
    """

    name: str
    path: Path
    raw: bytes
    config: DataConfig
    key: str = "text"
    lenient: bool = False
    labels: tuple[str, ...] = ()
    target: str = "label"
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()

    @property
    def wanted(self) -> tuple[str, str]:
        """The columns of the inputs and of the labels; of several tasks, those of the first one; of answers, theirs."""
        labels = self.label_columns
        return str(getattr(self.config, self.key)), labels[-1] if self.targets.entries else labels[0]

    @property
    def targets(self) -> TargetColumns:
        """What the columns of the targets hold."""
        return TARGET_COLUMNS[self.target]

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of the labels: one, one for each task, or the questions before their answers."""
        return self.targets.names(self.config)

    @property
    def label_entries(self) -> tuple[str, ...]:
        """The entries of the configuration that name them."""
        return self.targets.entries or (self.target,) * len(self.label_columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those, and the column of the units where there is one."""
        wanted = (self.wanted[0], *self.label_columns)
        return wanted if self.config.unit is None else (*wanted, self.config.unit)


Columns = tuple[list[str], dict[str, list[object]]]  # the names of all columns; the values of those wanted and there


def format_value(file: DataFile, column: str, number: int, value: object) -> str:
    """Return a value as the string that every format would give it; "" if it is missing.

    Args:
        file: That holds it.
        column: Its column.
        number: Of its record, from 1.
        value: As the format's reader has read it.

    Raises:
        DataError: If it is no text, number, truth value or date.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float | Decimal | date):
        return str(value)
    got = f"a {type(value).__name__} in column {column!r} of record {number}"
    raise DataError(f"{file.name} holds {got}, expected text: convert that column", code="data.wrong_type")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
