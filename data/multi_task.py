"""Records of several tasks: a record has a label of each task that somebody has labeled it for, named "task/class".

All tasks read the same input, so that a record is one record, whatever it is labeled for: it is sampled, clipped and charged
once. No module that this one imports loads PyTorch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from cotune.data.records import Records
from cotune.data.types import Label, class_names_in
from cotune.errors import DataError

_BETWEEN = "/"
MULTI_TASK = {  # type of the tasks: task; of texts, some with tags, that with tags
    "sequence-classification": "multi-task",
    "image-classification": "multi-task-images",
    "token-classification": "multi-task-tags",
}
NOT_HELD = "labels of no task that is held"


def is_multi_task(task: str) -> bool:
    """Whether records are those of several tasks."""
    return task in MULTI_TASK.values()


def qualify(task: str, name: str) -> str:
    """Return the name that a class of a task has among those of all tasks."""
    return f"{task}{_BETWEEN}{name}"


def task_of(label: str) -> str:
    """Return the task that a qualified class name belongs to."""
    return label.partition(_BETWEEN)[0]


def split_labels(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return task -> its class names, of qualified ones, in their order.

    >>> split_labels(["topic/games", "topic/net", "language/perl"])
    {'topic': ('games', 'net'), 'language': ('perl',)}
    """
    found: dict[str, list[str]] = {}
    for label in labels:
        task, _, name = label.partition(_BETWEEN)
        found.setdefault(task, []).append(name)
    return {task: tuple(names) for task, names in found.items()}


def keep_tasks(records: Records, tasks: Collection[str]) -> Records:
    """Return the same records with the labels of some tasks alone; one that is labeled for no other keeps its place."""
    held = frozenset(tasks)
    return replace(records, labels=tuple(_labels_of(label, held) for label in records.labels))


def _labels_of(label: Label, held: Collection[str]) -> Label:
    return tuple(name for name in class_names_in(label) if task_of(name) in held)


def check_task_labels(tasks: Sequence[str], labels: Sequence[str], source: str) -> None:
    """Check that every task has two classes or more, and nothing else has any. Raises DataError."""
    found: Mapping[str, tuple[str, ...]] = split_labels(labels)
    few = next((task for task in tasks if len(found.get(task, ())) < 2), None)
    if few is not None:
        raise DataError(
            f"{source} has the classes {', '.join(found.get(few, ())) or 'of nothing'} for the task {few!r}, and a classifier"
            " needs two or more: check the column of its labels in [[tasks]], or list the classes there",
            code="data.too_few_classes",
        )
