"""Every task names an entry of [data] of which the readers know what its columns hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.data.config import TASK_FACTS, DataConfig
from cotune.data.readers.data_file import DataFile
from cotune.data.tasks.target_columns import TARGET_COLUMNS
from cotune.data.tasks.task import get_task

SEVERAL = {"tasks": (("topic", "section"), ("tone", "mood"))}
CONFIGS = {
    "label": ({"label": "class"}, ("class",)),
    "tasks": (SEVERAL, ("section", "mood")),
    "text": ({"text": "body"}, ("body",)),
    "target": ({"prompt": "q", "target": "a"}, ("a",)),
    "messages": ({"messages": "chat"}, ("chat",)),
    "answers": ({"question": "q", "answers": "a"}, ("q", "a")),
}


@pytest.mark.parametrize("entry", TARGET_COLUMNS)
def test_columns_are_those_that_the_entry_names(entry: str) -> None:
    given, expected = CONFIGS[entry]
    file = DataFile("x.csv", Path("x.csv"), b"", DataConfig.model_validate({"source": "x.csv", **given}), target=entry)
    assert file.label_columns == expected
    assert len(file.label_entries) == len(expected)
    assert file.wanted[1] in expected
    assert file.targets.in_tuples == (entry in ("tasks", "answers"))


@pytest.mark.parametrize("task", TASK_FACTS)
def test_every_task_reads_targets_that_are_known(task: str) -> None:
    for given, _ in CONFIGS.values():
        key, target = get_task(task).columns(DataConfig.model_validate({"source": "x.csv", **given}))  # type: ignore[arg-type]
        assert target in TARGET_COLUMNS
        assert key in DataConfig.model_fields
