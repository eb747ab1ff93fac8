"""Records with a column of labels for each task."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from tests.support.multi_task import write_tasks

MOOD = ("mood", "mood")
LENGTH = ("length", "length")


@pytest.mark.parametrize("held", [(MOOD,), (LENGTH,), (MOOD, LENGTH)])
def test_labels_of_the_tasks_that_are_held_are_read(tmp_path: Path, held: tuple[tuple[str, str], ...]) -> None:
    """An organization may hold one of a plan's tasks alone."""
    source = write_tasks(tmp_path / "records.csv", 60)
    records = read_records(DataConfig(source=str(source), tasks=held), source, task="multi-task")
    names = {name for label in records.labels for name in label}
    assert {name.partition("/")[0] for name in names} == {task for task, _ in held}
    assert len(records.inputs) > 20


def test_repeated_header_is_no_record_with_one_task_either(tmp_path: Path) -> None:
    source = write_tasks(tmp_path / "records.csv", 60)
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    source.write_text("".join([*lines, lines[0], "a new text,good,long,person 1\n"]), encoding="utf-8")
    config = DataConfig(source=str(source), tasks=(MOOD,))
    records = read_records(config, source, task="multi-task")
    assert {name for label in records.labels for name in label} == {"mood/bad", "mood/good", "mood/so"}
