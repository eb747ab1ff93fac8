"""What the columns of a task's targets hold, by the entry of [data] that names them; readers of files ask this table.

Which entry it is a task says itself (`Task.columns`). This module imports no task, as tasks import the readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cotune.data.config import DataConfig


@dataclass(frozen=True)
class TargetColumns:
    """The columns that one kind of target is read from.

    Attributes:
        entries: The entries of [data] that name the columns, in the order of a record's label; empty: [[tasks]] names one column
            for each task.
        in_tuples: Whether a record's label is a tuple with one value for each column; else it is the value itself.
        has_classes: Whether the values may be names of classes, by which a reader of CSV tells where a record ends.
        has_lists: Whether every value is a list, so that a JSON object with a list may be one record instead of a whole table.
    """

    entries: tuple[str, ...]
    in_tuples: bool = False
    has_classes: bool = False
    has_lists: bool = False

    def names(self, config: DataConfig) -> tuple[str, ...]:
        """Return the names of the columns, which are at least one."""
        if not self.entries:
            return tuple(column for _, column in config.tasks)
        return tuple(str(getattr(config, entry)) for entry in self.entries)


TARGET_COLUMNS: Mapping[str, TargetColumns] = {
    "label": TargetColumns(("label",), has_classes=True),
    "tasks": TargetColumns((), in_tuples=True),
    "text": TargetColumns(("text",)),
    "target": TargetColumns(("target",)),
    "messages": TargetColumns(("messages",), has_lists=True),
    "answers": TargetColumns(("question", "answers"), in_tuples=True),
}
